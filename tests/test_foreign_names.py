"""What a name of TRL or of another library is answered with: ours, or the reason; never a name that misleads."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from common.cli import parse_config, parse_settings
from common.evaluation.settings import EvaluationSettings
from common.foreign_names import NAMES_FILE, ForeignName, algorithm_settings, foreign_names
from common.merge import MergeSettings
from examples.sft.sft import SFTSettings
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from PPO.ppo_trainer import PPOConfig
from RAFT.raft_trainer import RAFTConfig
from RLOO.rloo_trainer import RLOOConfig
from tests import forked
from tests.toy import algorithms
from tools.names import PAGE, RULE, tables
from VinePPO.vineppo_trainer import VinePPOConfig

# What users type most: the name, a value, and what the answer must show. {} is the setting as it is written there.
TYPED = {
    # The same value.
    "beta": (0.04, "{kl_coef=0.04}"),
    "num_iterations": (2, "{num_update_epochs=2}"),
    "max_steps": (500, "{num_steps=500}"),
    "epsilon": (0.1, "{clip_range=0.1}"),
    "epsilon_high": (0.28, "{clip_range_high=0.28}"),
    "mask_truncated_completions": (True, "{mask_truncated=True}"),
    "vllm_gpu_memory_utilization": (0.3, "{vllm_memory_share=0.3}"),
    "eval_steps": (50, "{eval_every=50}"),
    "save_steps": (50, "{save_every=50}"),
    "num_generations_eval": (4, "{eval_num_samples=4}"),
    "hub_model_id": ("me/x", "{push_to_hub='me/x'}"),
    "model_name_or_path": ("Qwen/x", "{model='Qwen/x'}"),
    "dataset_name": ("me/data", "{dataset='me/data'}"),
    "dataset_train_split": ("test", "{dataset_split='test'}"),
    "use_peft": (True, "{use_lora=True}"),
    "normalize_advantages": (True, "{whiten_advantages=True}"),
    "num_ppo_epochs": (4, "{num_update_epochs=4}"),
    "num_mini_batches": (2, "{num_minibatches=2}"),
    "init_kl_coef": (0.2, "{kl_coef=0.2}"),
    "cliprange": (0.2, "{clip_range=0.2}"),
    "response_length": (53, "{max_completion_length=53}"),
    "rloo_k": (4, "{num_generations=4}"),
    "lr": (1e-6, "{learning_rate=1e-06}"),
    "max_new_tokens": (99, "{max_completion_length=99}"),
    "group_size": (4, "{num_generations=4}"),
    # Another value.
    "per_device_train_batch_size": (8, "prompts_per_step here: prompts"),
    "gradient_accumulation_steps": (4, "gradients are accumulated over the rest of a mini-batch without a number"),
    "eval_dataset": ("test.jsonl", "it is num_eval_prompts here"),
    "generation_batch_size": (64, "prompts_per_step here: prompts, not completions"),
    "steps_per_generation": (4, "num_minibatches here"),
    "num_train_epochs": (1, "num_steps here: steps, not passes"),
    "use_vllm": (True, 'sampler here: true is "vllm"'),
    "loss_type": ("dapo", 'average_over here: "grpo" is rows, "dapo" and "bnpo" are tokens'),
    "scale_rewards": (False, 'scale_by_std here: "group" is true, "none" is false'),
    "bf16": (True, 'dtype here: "bfloat16"'),
    "fp16": (True, "dtype here: bfloat16, or float32"),
    "optim": ("adamw_bnb_8bit", "optimizer here: adamw_torch and adamw_torch_fused are adamw"),
    "lr_scheduler_type": ("cosine_with_min_lr", "lr_scheduler here: constant, linear or cosine"),
    "warmup_ratio": (0.1, "warmup_steps here: in steps, so warmup_ratio x num_steps"),
    "eval_strategy": ("steps", "eval_every here"),
    "save_strategy": ("no", "save_every here"),
    "logging_dir": ("x", "{output_dir='x'}"),
    "run_name": ("x", "output_dir here: the name of its last folder"),
    "log_completions": (True, "samples_every here"),
    "disable_tqdm": (True, "progress here: the other way round"),
    "resume_from_checkpoint": (True, "resume here: the same command continues"),
    "reward_funcs": ("x", "rewards here: names of the task's rewards"),
    "total_episodes": (1000, "num_steps here: total_episodes / (prompts_per_step x num_generations)"),
    "local_rollout_forward_batch_size": (8, "max_tokens_per_microbatch here: padded tokens"),
    "use_bias_correction_kl": (True, "kl_place here"),
    "vllm_importance_sampling_correction": (True, "it is importance_correction here"),
    "dynamic_sampling": (True, "it is refill_rounds here"),
    # There is none.
    "top_p": (0.9, "training samples with temperature alone"),
    "top_k": (50, "training samples with temperature alone"),
    "repetition_penalty": (1.1, "training samples with temperature alone"),
    "logging_steps": (10, "every step is a line of metrics.jsonl"),
    "optim_args": ("x", "the optimizer is AdamW"),
    "vllm_mode": ("server", 'sampler here: "colocate" is "vllm"'),
    "vllm_server_host": ("x", "sampler_url here: one address"),
    "remove_unused_columns": (False, "reward functions get every column"),
    "use_liger_kernel": (True, "logits are never kept"),
    "deepspeed": ("zero3.json", "the policy is whole on every process"),
    "sync_ref_model": (True, "the reference stays the policy as it was at the start"),
    "entropy_coef": (0.01, "no entropy bonus"),
    "delta": (1.5, "no second clip"),
    "overwrite_output_dir": (True, "never overwritten"),
    "load_best_model_at_end": (True, "always kept"),
    "stop_token": ("eos", "end tokens of the model's generation config"),
    "wandb_project": ("thesis", "the project of W&B is WANDB_PROJECT in the environment"),
    "wandb_entity": ("team", "WANDB_ENTITY"),
    # An algorithm's own.
    "importance_sampling_level": ("sequence", "it is ratio_level, a setting of RLOO, which GRPO does not have"),
    "lam": (0.95, "it is gae_lambda, a setting of PPO, which GRPO does not have."),
    "vf_coef": (0.1, "it is value_loss_coef, a setting of PPO, which GRPO does not have."),
    "cliprange_value": (0.2, "it is value_clip_range, a setting of PPO, which GRPO does not have."),
    "gamma": (1.0, "it is a setting of Distill, PPO, ReMax and Reinforce, which GRPO does not have."),
}


def as_word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def shown(expected: str, form: str) -> str:
    """{name=value} as the command line, a file or Python has it."""
    if not expected.startswith("{"):
        return expected
    name, _, value = expected[1:-1].partition("=")
    plain = {"True": "true", "False": "false"}.get(value, value.strip("'"))
    return {"python": f"Write {name}={value}.", "line": f"Write --{name} {plain}.", "file": f"Write {name}: {plain}."}[
        form
    ]


def answer(settings_class: type, *args: str) -> str:
    """What a command line is refused with."""
    with pytest.raises(ValueError) as caught:
        if settings_class.__name__.endswith("Config"):
            parse_config(settings_class(preset="none"), args=list(args))
        else:
            parse_settings(settings_class, list(args))
    assert str(caught.value).count("\n") < 8
    return str(caught.value)


@pytest.mark.parametrize("name", TYPED)
def test_a_name_of_trl_on_the_command_line_is_answered_with_ours_or_with_the_reason(name):
    value, expected = TYPED[name]
    for args in ([f"--{name}", as_word(value)], [f"--{name.replace('_', '-')}={as_word(value)}"]):
        message = answer(GRPOConfig, *args)
        assert message.startswith("unknown setting '") and " on the command line: " in message
        assert shown(expected, "line") in message


@pytest.mark.parametrize("name", TYPED)
def test_so_is_one_in_a_file(tmp_path, name):
    value, expected = TYPED[name]
    path = tmp_path / "from_trl.yaml"
    path.write_text(yaml.safe_dump({name: value}))
    message = answer(GRPOConfig, "--config", str(path))
    assert message.startswith(f"unknown setting {name!r} in {path}: ") and shown(expected, "file") in message


@pytest.mark.parametrize("name", TYPED)
def test_so_is_one_in_python(name):
    value, expected = TYPED[name]
    with pytest.raises(TypeError) as caught:
        GRPOConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"unknown setting {name!r} in GRPOConfig(...): ")
    assert shown(expected, "python") in message


# The list


def test_no_setting_of_trl_is_missing():
    trl = pytest.importorskip("trl")
    theirs = {field.name for config in (trl.GRPOConfig, trl.RLOOConfig) for field in fields(config)}
    theirs |= {field.name for field in fields(trl.ModelConfig)}
    assert theirs <= {name for row in foreign_names() for name in row.names}


def test_every_name_stands_there_once():
    names = [name for row in foreign_names() for name in row.names]
    assert len(names) == len(set(names)) > 390


def settings_here() -> dict[str, set[str]]:
    return {name: {field.name for field in fields(found.config)} for name, found in algorithms().items()}


def test_the_settings_that_are_named_exist_and_those_that_are_the_same_too():
    everything = set().union(*settings_here().values())
    for row in foreign_names():
        assert row.ours is None or row.ours in everything, row
        assert not row.is_same or set(row.names) <= everything, row
        assert row.is_same or not set(row.names) & everything, row


@pytest.mark.parametrize("row", [row for row in foreign_names() if row.ours], ids=lambda row: row.names[0])
def test_a_setting_that_not_every_algorithm_has_is_no_answer_to_those_without(row: ForeignName):
    for name, found in algorithms().items():
        message = answer(found.config, f"--{row.names[0]}", "1")
        if row.ours in settings_here()[name]:
            assert f"it is {row.ours} here" in message
        else:
            assert f"it is {row.ours}, a setting of" in message and f"which {name} does not have" in message


def test_the_settings_of_the_algorithms_are_read_without_importing_them():
    assert {name: set(names) for name, names in algorithm_settings().items()} == settings_here()


def test_the_page_has_the_tables_of_the_list():
    assert PAGE.read_text().partition(RULE)[2] == tables(), "run tools/names.py --write"


def test_what_the_page_shows_is_what_is_said():
    command, _, rest = PAGE.read_text().partition("    $ python grpo.py ")[2].partition("\n")
    said = rest.partition("\n\n")[0].replace("\n    ", "\n").strip()
    assert f"error: {answer(GRPOConfig, *command.split())}" == said


def test_the_command_that_the_page_shows_is_read():
    shown = PAGE.read_text().partition("    python GRPO/grpo.py ")[2].partition("\n\n")[0].replace("\\\n", "")
    config = parse_config(GRPOConfig(preset="none"), args=shown.split())
    assert (config.rewards, config.prompts_per_step, config.kl_coef) == (["rewards.py:my_reward"], 8, 0.04)


def test_the_file_is_installed_with_the_package():
    assert NAMES_FILE.name == "foreign_names.yaml"
    assert '"*.yaml"' in (PAGE.parent.parent / "pyproject.toml").read_text().partition("package-data")[2]


@pytest.mark.parametrize("given", [["reward_funcs"], ["model", "reward_funcs", "args", "train_dataset"]])
def test_the_arguments_of_a_trainer_of_trl_are_answered_with_those_of_ours(given):
    with pytest.raises(TypeError) as caught:
        GRPOTrainer(**dict.fromkeys(given))
    assert str(caught.value).startswith(
        f"GRPOTrainer({', '.join(f'{name}=...' for name in given)}): nothing reads that."
    )
    assert "GRPOTrainer(GRPOConfig(model=...), task=Task(train=..., rewards=...))" in str(caught.value)
    page = PAGE.read_text().partition(RULE)[0]
    assert all(f"`{name}`" in page for name in given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("GRPOConfig(beta=0.04)", "it is kl_coef here. Write kl_coef=0.04."),
        ("GRPOConfig(num_generations='8x')", "num_generations='8x': need int."),
        ("GRPOTrainer(GRPOConfig(), reward_funcs=[len])", "GRPOTrainer(reward_funcs=...): nothing reads that."),
    ],
)
def test_a_python_program_ends_with_the_message_and_its_line(tmp_path, line, said):
    script = tmp_path / "mine.py"
    script.write_text(f"from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer\n\ndef main():\n    {line}\n\nmain()\n")
    done = forked.run([script])
    assert done.returncode == 2 and done.stderr.startswith(f"error: {script}, line 6: ") and said in done.stderr
    assert done.stderr.count("\n") < 8


@pytest.mark.slow
@pytest.mark.parametrize("code", ["int('x')", "raise ValueError('mine')", "import json; json.loads('{')"])
def test_an_error_that_is_not_ours_keeps_its_traceback(tmp_path, code):
    script = tmp_path / "mine.py"
    script.write_text(f"import common\n{code}\n")
    environment = os.environ | {"PYTHONPATH": str(PAGE.parent.parent)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


# Other names


@pytest.mark.parametrize(
    ("config", "typed", "said"),
    [
        (
            RAFTConfig,
            "clip_range",
            "it is a setting of CISPO, DAPO, Distill, GRPO, GSPO, PPO, RLOO, ReMax,",
        ),
        (RLOOConfig, "importance_sampling_level", "it is ratio_level here"),
        (RLOOConfig, "scale_rewards", "a setting of GRPO, which RLOO does not have: whiten_advantages scales"),
        (PPOConfig, "lam", "it is gae_lambda here. Write --gae_lambda 0.5."),
        (VinePPOConfig, "value_learning_rate", "it is a setting of PPO, which VinePPO does not have."),
        (GRPOConfig, "vine_k", "it is a setting of VinePPO, which GRPO does not have."),
        # Declared beside the trainer, in a class that DAPOConfig is built on.
        (GRPOConfig, "overlong_penalty", "it is a setting of DAPO, which GRPO does not have."),
        (GRPOConfig, "overlong_buffer_len", "it is overlong_buffer, a setting of DAPO, which GRPO does not have"),
        (RLOOConfig, "loss_mode", "each loss is an algorithm, with a script of its own, such as GRPO/grpo.py"),
        # Slips.
        (GRPOConfig, "num_iteration", "Did you mean num_iterations? It is num_update_epochs here. Write --num_update"),
        (GRPOConfig, "learning_rte", "nothing reads it. Did you mean learning_rate?"),
        (GRPOConfig, "gama", "Did you mean gamma? It is a setting of Distill, PPO, ReMax and Reinforce"),
        (GRPOConfig, "max_prompt", "Did you mean max_prompt_length?"),
        (GRPOConfig, "train_learning_rate", "Did you mean learning_rate?"),
        # Groups, as hydra writes them.
        (GRPOConfig, "actor.optim.lr", "it is learning_rate here. Write --learning_rate 0.5."),
        (GRPOConfig, "algorithm.kl_coef", "settings have no groups. Write --kl_coef 0.5."),
    ],
)
def test_a_name_is_answered_by_what_its_algorithm_has(config, typed, said):
    assert said in answer(config, f"--{typed}", "0.5")


@pytest.mark.parametrize("name", ["zzz", "k", "level", "every", "tokens", "stopid", "no_sparze", "alpha_x"])
def test_what_is_near_to_nothing_gets_no_suggestion(name):
    message = answer(GRPOConfig, f"--{name}", "1")
    assert message.endswith("nothing reads it. See --help for every setting.")


def test_nothing_of_another_library_is_answered_with_a_slip():
    for row in foreign_names():
        for name in row.names if not row.is_same else ():
            assert "Did you mean" not in answer(GRPOConfig, f"--{name}", "1"), name


@pytest.mark.parametrize(
    ("command", "typed", "said"),
    [
        (EvaluationSettings, "max_new_tokens", "it is max_completion_length here. Write --max_completion_length 3."),
        (EvaluationSettings, "model_name_or_path", "it is model here. Write --model 3."),
        (EvaluationSettings, "eval_temperature", "Did you mean temperature?"),
        (GRPOConfig, "eval_temp", "Did you mean eval_temperature?"),
        (EvaluationSettings, "beta", "it is kl_coef, a setting of the algorithms, which this command does not have."),
        (EvaluationSettings, "learning_rate", "it is a setting of the algorithms, which this command does not have."),
        (EvaluationSettings, "num_problem", "Did you mean num_problems?"),
        (MergeSettings, "output_dir", "Did you mean output?"),
        (SFTSettings, "num_train_epochs", "it is num_epochs here. Write --num_epochs 3."),
        (SFTSettings, "per_device_train_batch_size", "it is batch_size here. Write --batch_size 3."),
        (SFTSettings, "max_seq_length", "it is max_length here. Write --max_length 3."),
        (SFTSettings, "lr", "it is learning_rate here. Write --learning_rate 3."),
    ],
)
def test_a_command_that_is_no_algorithm_answers_with_its_own_settings(command, typed, said):
    assert said in answer(command, f"--{typed}", "3")


def test_several_unknown_names_are_answered_together_in_at_most_eight_lines():
    names = ["beta", "epsilon", "logging_steps", "zzz", "bf16", "max_steps", "lr", "top_p"]
    lines = answer(GRPOConfig, *(word for name in names for word in (f"--{name}", "1"))).splitlines()
    assert lines[0] == "unknown settings on the command line:" and len(lines) == 8
    assert [line.split()[0] for line in lines[1:7]] == [f"{name}:" for name in names[:6]]
    assert lines[7].startswith("  and lr, top_p; docs/from-trl.md")


def test_a_block_in_a_file_is_answered_with_the_line_that_was_meant(tmp_path):
    path = tmp_path / "nested.yaml"
    path.write_text("num_steps: 3\noptimizer:\n  learning_rate: 1.0e-4\n  weight_decay: 0.1\n")
    message = answer(GRPOConfig, "--config", str(path))
    assert message.startswith(f"unknown setting 'optimizer' in {path}: a block with learning_rate, weight_decay: ")
    assert message.endswith("Write learning_rate: 0.0001 at the beginning of a line.")
    path.write_text("training_args: {beta: 0.04}")
    assert "Write kl_coef: 0.04 at the beginning of a line." in answer(GRPOConfig, "--config", str(path))
    path.write_text("evaluate: {temperature: 0.5}")
    assert "Write temperature: 0.5" in answer(EvaluationSettings, "--config", str(path))
