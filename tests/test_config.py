"""Settings: what is refused before anything is loaded, what text becomes, what depends on the number of processes."""

import re
import warnings
from dataclasses import asdict, fields

import pytest

from common.config import RLConfig
from common.remarks import remarks
from GRPO.grpo_trainer import GRPOConfig
from PPO.ppo_trainer import PPOConfig
from Reinforce.reinforce_trainer import ReinforceConfig
from ReMax.remax_trainer import ReMaxConfig
from RLOO.rloo_trainer import RLOOConfig
from VinePPO.vineppo_trainer import VinePPOConfig

NAN, INF = float("nan"), float("inf")
AT_LEAST_ONE = [
    *("num_steps", "prompts_per_step", "num_generations", "num_minibatches", "num_update_epochs", "max_prompt_length"),
    *("max_completion_length", "max_tokens_per_microbatch", "lora_r", "lora_alpha", "save_total_limit"),
    *("eval_num_samples", "vllm_max_num_seqs"),
]
NOT_NEGATIVE = [
    *("num_eval_prompts", "kl_coef", "warmup_steps", "min_lr_ratio", "weight_decay", "max_grad_norm", "eval_every"),
    *("eval_temperature", "eval_top_k", "early_stopping_patience", "save_every", "samples_every", "learning_rate"),
]
CHOICES = ["sampler", "lr_scheduler", "average_over", "offload", "dtype", "resume"]


def refused(config_class, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        config_class(**settings)
    return str(caught.value)


# What is refused


@pytest.mark.parametrize(
    "settings",
    [
        *({name: 0} for name in AT_LEAST_ONE),
        *({name: -1} for name in NOT_NEGATIVE),
        *({name: value} for name in ("learning_rate", "kl_coef", "max_grad_norm") for value in (NAN, INF)),
        *({"temperature": value} for value in (0.0, -1.0, NAN, INF)),
        *({name: value} for name in ("adam_beta1", "adam_beta2") for value in (-0.1, 1.0, NAN)),
        *({name: value} for name in ("eval_top_p", "vllm_memory_share") for value in (0.0, 1.1, NAN)),
        *({name: "nonsense"} for name in CHOICES),
        {"vllm_sleep_level": 3},
        {"min_lr_ratio": 1.1},
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused_and_the_message_says_what_to_pass(settings):
    ((name, value),) = settings.items()
    message = refused(RLConfig, **settings)
    assert message.startswith(f"{name}={value!r}")
    assert f"--{name}" in message.partition(": ")[2]
    assert re.search(r"need|must", message) or "share in" in message


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"reward_weights": [1.0]}, ["reward_weights=[1.0] without rewards", "--rewards"]),
        ({"rewards": ["a", "b"], "reward_weights": [1.0]}, ["1 reward_weights for 2 rewards", "a, b"]),
        ({"rewards": []}, ["rewards=[]"]),
        ({"rewards": ["a"], "reward_weights": [NAN]}, ["reward_weights"]),
        ({"early_stopping_patience": 2, "eval_every": 0}, ["without evaluation", "--eval_every"]),
        ({"early_stopping_patience": 2, "num_eval_prompts": 0}, ["without evaluation", "--num_eval_prompts"]),
        ({"prompts_per_step": 3, "num_generations": 3, "num_minibatches": 2}, ["9 rows", "divisor"]),
        ({"eval_kl": True, "eval_temperature": 0.0}, ["eval_temperature=0.0", "--eval_temperature 1.0"]),
        ({"eval_kl": True, "eval_temperature": 0.6, "temperature": 0.7}, ["--eval_temperature 0.7"]),
        ({"eval_kl": True, "eval_top_p": 0.9}, ["eval_top_p=0.9", "another distribution", "--eval_kl false"]),
        ({"eval_kl": True, "eval_top_k": 5}, ["eval_top_k=5", "--eval_top_k 0"]),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(settings, fragments):
    message = refused(RLConfig, **settings)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"num_generations": 1}, ["num_generations=1", "at least 2", "--num_generations 8"]),
        ({"clip_range": 0.0}, ["clip_range=0.0", "--clip_range"]),
        ({"clip_range": 1.01}, ["clip_range=1.01", "(0, 1]"]),
        ({"clip_range": NAN}, ["clip_range=nan"]),
        ({"clip_range_high": 0.0}, ["clip_range_high=0.0", "above 0"]),
        ({"clip_range_high": NAN}, ["clip_range_high=nan"]),
        ({"importance_correction": "clip"}, ["importance_correction='clip'", "auto, none, truncate, mask"]),
        *(({"importance_cap": cap}, [f"importance_cap={cap}", "1 or more"]) for cap in (0.0, -1.0, 0.99, NAN, INF)),
        ({"importance_cap": 1.0, "importance_correction": "mask"}, ["importance_cap=1.0", "mask", "Pass --"]),
        ({"kl_estimator": "k4"}, ["kl_estimator='k4'", "k1, k2, k3", "--kl_estimator"]),
        ({"kl_place": "advantage"}, ["kl_place='advantage'", "loss, reward", "--kl_place"]),
        ({"sparse": True, "whiten_advantages": True}, ["sparse with whiten_advantages", "--sparse false"]),
        (
            {"keep_per_group": True, "prompts_per_step": 6, "num_generations": 8, "num_minibatches": 4},
            ["num_minibatches=4: keep_per_group", "prompts_per_step=6", "divisor"],
        ),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, ["kl_estimator=k1 in the loss", "mean zero", "--kl_estimator k3"]),
        ({"whiten_rewards": True}, ["whiten_rewards with scale_by_std", "cancels", "--scale_by_std false"]),
        ({"temperature": 0.0}, ["temperature=0.0", "--eval_temperature 0"]),
    ],
    ids=str,
)
def test_what_grpo_cannot_do_is_refused(settings, fragments):
    message = refused(GRPOConfig, **settings)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
def test_one_kept_completion_per_prompt_must_make_equal_mini_batches_in_every_algorithm(config):
    settings = {"keep_per_group": True, "prompts_per_step": 4, "num_generations": 4}
    assert "num_minibatches=8: keep_per_group" in refused(config, num_minibatches=8, **settings)
    assert config(num_minibatches=2, **settings).keep_per_group


@pytest.mark.parametrize("config", [GRPOConfig, ReinforceConfig, ReMaxConfig, RLOOConfig, VinePPOConfig])
def test_rewards_cannot_be_scaled_where_whitening_would_take_the_scale_out_again(config):
    without = {"scale_by_std": False} if config is GRPOConfig else {}
    message = refused(config, whiten_rewards=True, whiten_advantages=True, **without)
    assert "whiten_rewards with whiten_advantages" in message and "--whiten_advantages false" in message
    assert config(whiten_rewards=True, whiten_advantages=False, **without).whiten_rewards


def test_ppo_takes_both_since_its_values_keep_the_scale():
    assert PPOConfig(whiten_rewards=True, whiten_advantages=True).whiten_rewards


@pytest.mark.parametrize("name", ["value_learning_rate", "value_init_learning_rate", "value_loss_coef"])
@pytest.mark.parametrize("value", [-1e-5, NAN, float("inf")])
def test_rates_of_the_value_model_are_checked_under_their_own_names(name, value):
    message = refused(PPOConfig, **{name: value})
    assert message.startswith(f"{name}={value}: need a finite number, 0 or more") and f"Pass --{name}" in message
    assert vars(PPOConfig(**{name: 0.0}))[name] == 0


@pytest.mark.parametrize("config", [GRPOConfig, PPOConfig, VinePPOConfig])
def test_where_a_kl_can_act_is_checked_alike_in_every_algorithm_that_has_the_choice(config):
    assert config(kl_place="loss", kl_coef=0.1).has_kl_in_loss
    assert not config(kl_place="loss").has_kl_in_loss and not config(kl_place="reward", kl_coef=0.1).has_kl_in_loss
    assert "kl_place='nowhere'" in refused(config, kl_place="nowhere")
    assert "mean zero" in refused(config, kl_place="loss", kl_estimator="k1")
    assert "--kl_place loss" in refused(config, kl_place="reward", kl_estimator="k3")
    written = config()
    written.origins = {"kl_place": ""}
    assert remarks(written) == [f"kl_place={written.kl_place}: it does nothing, since kl_coef is 0"]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_in_the_reward_refuses_an_estimator_that_would_not_pull_there(estimator):
    """In the reward only k1 gives the gradient of the KL: near the reference k2 and k3 pull at next to nothing."""
    assert "--kl_estimator k1" in refused(GRPOConfig, kl_coef=0.1, kl_place="reward", kl_estimator=estimator)


def test_a_kl_of_weight_zero_may_stand_anywhere():
    assert GRPOConfig(kl_coef=0.0, kl_place="reward", kl_estimator="k1").kl_coef == 0
    assert GRPOConfig(kl_coef=0.1, kl_place="reward", kl_estimator="k1").kl_place == "reward"


def test_sparse_warns_where_it_changes_the_gradient_and_only_there():
    with pytest.warns(UserWarning, match=r"kl_coef=0\.1.*not that of plain GRPO.*--sparse false"):
        GRPOConfig(sparse=True, kl_coef=0.1)
    with warnings.catch_warnings(action="error"):
        GRPOConfig(sparse=True, kl_coef=0.0)
        GRPOConfig(sparse=False, kl_coef=0.1)
        GRPOConfig(sparse=True, kl_coef=0.1, kl_place="reward", kl_estimator="k1")


# Types


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("learning_rate", "2e-6", 2e-6), ("learning_rate", "1", 1.0), ("kl_coef", 1, 1.0), ("kl_coef", 0, 0.0)],
)
def test_numbers_that_yaml_reads_as_text_or_as_integers_become_what_was_meant(name, value, expected):
    config = RLConfig(**{name: value})
    assert vars(config)[name] == expected and isinstance(vars(config)[name], float)


def test_a_number_may_be_text_for_an_optional_setting_too():
    assert GRPOConfig(clip_range_high="0.28").clip_range_high == 0.28
    assert GRPOConfig(clip_range_high=None).clip_range_high is None


def test_numbers_within_lists_are_read_like_numbers_alone():
    config = RLConfig(rewards=["a", "b"], reward_weights=["1e-1", 1])
    assert config.reward_weights == [0.1, 1.0] and all(isinstance(weight, float) for weight in config.reward_weights)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "fast"),
        ("learning_rate", None),
        ("learning_rate", [1e-6]),
        ("kl_coef", True),
        ("kl_coef", False),  # what YAML makes of `off`
        ("num_steps", 10.0),
        ("num_steps", "10"),
        ("num_steps", True),
        ("num_generations", None),
        ("use_lora", 1),
        ("use_lora", "yes"),
        ("model", None),
        ("model", 3),
        ("rewards", "equation"),
        ("rewards", [3]),
        ("reward_weights", 0.5),
        ("seed", 1.5),
        ("report_to", 3),
    ],
)
def test_a_value_of_another_type_is_refused_by_the_name_of_its_setting(name, value):
    message = refused(RLConfig, **{name: value})
    assert message.startswith(f"{name}=") and f"--{name}" in message
    assert "NoneType" not in message  # the name of a type that no user has met


def test_trackers_may_be_none_and_a_hub_id_is_no_switch():
    """As users of transformers write them."""
    assert RLConfig(report_to=["none"]).report_to is RLConfig(report_to="none").report_to is None
    assert RLConfig(report_to="wandb").report_to == ["wandb"]
    assert RLConfig(report_to=["wandb"]).report_to == ["wandb"]
    for value in ("true", "False"):
        message = refused(RLConfig, push_to_hub=value)
        assert message.startswith(f"push_to_hub={value!r}: need the hub id") and "--push_to_hub me/my-model" in message
    assert RLConfig(push_to_hub="me/truest").push_to_hub == "me/truest"


def test_a_misspelt_setting_is_no_setting():
    with pytest.raises(TypeError, match="learning_rte"):
        GRPOConfig(learning_rte=1.0)


# What follows from the settings


def test_counts_are_totals_of_the_step():
    config = GRPOConfig(prompts_per_step=6, num_generations=4, num_minibatches=8)
    assert config.completions_per_step == 24


@pytest.mark.parametrize(("minibatches", "epochs", "on_policy"), [(1, 1, True), (2, 1, False), (1, 2, False)])
def test_one_optimizer_step_per_rollout_is_on_policy(minibatches, epochs, on_policy):
    assert RLConfig(num_minibatches=minibatches, num_update_epochs=epochs).trains_on_policy is on_policy


@pytest.mark.parametrize("config_class", [RLConfig, GRPOConfig])
def test_defaults_are_valid_and_survive_a_round_trip(config_class):
    with warnings.catch_warnings(action="error"):
        config = config_class()
        assert config_class(**asdict(config)) == config


def test_training_has_no_setting_that_samples_from_another_distribution_than_the_policys():
    """With top-p or top-k the log-probs would not be those of the distribution that was sampled from."""
    names = {field.name for field in fields(GRPOConfig)}
    assert {
        name for name in names if re.search(r"top_p|top_k|min_p|(repetition|presence|frequency)_penalty", name)
    } == {"eval_top_p", "eval_top_k"}


def test_grpos_defaults_are_those_of_its_paper():
    config = GRPOConfig()
    assert (config.average_over, config.scale_by_std, config.clip_range, config.kl_estimator, config.kl_place) == (
        "rows", True, 0.2, None, "loss"
    )  # fmt: skip


def test_what_bends_the_objective_is_off_unless_it_is_asked_for():
    config = RLConfig()
    assert config.kl_coef == config.missing_eos_penalty == config.weight_decay == config.early_stopping_patience == 0
    assert not (config.whiten_advantages or config.mask_truncated or config.eval_kl or config.use_lora)
    assert config.temperature == config.eval_temperature == config.eval_top_p == 1


def test_greedy_decoding_is_for_evaluation_alone():
    assert RLConfig(eval_temperature=0.0).eval_temperature == 0


def test_several_greedy_samples_per_prompt_are_refused():
    """They would all be the same: pass@k of one sample."""
    message = refused(RLConfig, eval_temperature=0.0, eval_num_samples=4)
    assert "eval_num_samples=4" in message and "--eval_temperature" in message


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GRPOConfig(clip_range=0.1), ["clip_range=0.1"]),
        (GRPOConfig(clip_range_high=0.3), ["clip_range_high=0.3"]),
        (GRPOConfig(clip_range=0.1, num_minibatches=2), []),
        (GRPOConfig(kl_place="reward"), ["kl_place=reward"]),
        (GRPOConfig(kl_place="reward", kl_coef=0.1), []),
        (RLConfig(lora_r=8, lora_alpha=16, lora_target_modules="q_proj"), ["lora_r=8", "lora_alpha", "lora_target"]),
        (RLConfig(lora_r=8, use_lora=True), []),
        (RLConfig(vllm_sleep_level=2, sampler="transformers"), ["vllm_sleep_level=2", "sampler is transformers"]),
        (RLConfig(vllm_sleep_level=2), []),
        (RLConfig(min_lr_ratio=0.5), ["min_lr_ratio=0.5"]),
        (RLConfig(min_lr_ratio=0.5, lr_scheduler="linear"), []),
        (RLConfig(reward_memory_limit=1.0, reward_time_limit=0.0), ["reward_memory_limit=1.0"]),
        (RLConfig(save_every=0, save_total_limit=5), ["save_total_limit=5"]),
        (RLConfig(eval_temperature=0.0, eval_top_p=0.9, eval_top_k=5), ["eval_top_p=0.9, eval_top_k=5"]),
        (RLConfig(eval_every=0, eval_num_samples=4, eval_kl=True), ["eval_num_samples=4, eval_kl=True"]),
        (RLConfig(eval_num_samples=4, eval_kl=True), []),
        (RLConfig(num_eval_prompts=0, eval_num_samples=4), ["eval_num_samples=4"]),
        (RLConfig(reward_format="conversational"), ["reward_format=conversational"]),
        (RLConfig(reward_format="conversational", rewards=["mine.py:polite"]), []),
        (RLConfig(reward_format="text", rewards=["mine.rewards:polite"]), []),
        (PPOConfig(value_clip_range=0.5), ["value_clip_range=0.5"]),
        (PPOConfig(value_clip_range=0.5, num_update_epochs=2), []),
        (PPOConfig(value_init="none", value_init_epochs=2), ["value_init_epochs=2", "value_init is none"]),
        (PPOConfig(value_init_epochs=2), []),
        (VinePPOConfig(vine_k=5, chunk_length=1024), ["vine_k=5"]),
        (VinePPOConfig(vine_k=5, chunk_length=1024, num_generations=1), []),
        (VinePPOConfig(vine_k=5), []),
        (VinePPOConfig(chunk_separator="\n", chunk_length=1024), ["chunk_separator"]),
    ],
    ids=str,
)
def test_what_does_nothing_next_to_the_other_settings_is_named(config, named):
    said = "\n".join(remarks(config))
    assert bool(said) is bool(named) and all(part in said for part in named)


def test_only_what_the_user_set_is_named():
    """A value of the script or of a preset that does nothing was not asked for; one that was typed was."""
    config = GRPOConfig(use_lora=False, lora_r=8)
    config.origins = {"lora_r": "preset cpu"}
    assert remarks(config) == []
    config.origins = {"lora_r": "", "lora_alpha": "", "kl_estimator": "GRPO/grpo.py"}
    assert remarks(config) == ["lora_r=8, lora_alpha=64: they do nothing, since use_lora is false"]
    config.origins = {"lora_r": "mine.yaml", "lora_alpha": "mine.yaml"}
    assert remarks(config) == ["lora_r=8: it does nothing, since use_lora is false"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_steps": 3, "warmup_steps": 5}, "rises until the last step, where it is 0.6"),
        ({"num_steps": 3, "warmup_steps": 3, "lr_scheduler": "cosine"}, "rises until the last step, where it is 1:"),
        ({"num_steps": 1, "lr_scheduler": "cosine"}, "is 0.1 at most, not learning_rate=1"),
        ({"num_steps": 1, "warmup_steps": 2}, "where it is 0.5:"),
        ({"num_steps": 3, "lr_scheduler": "linear", "min_lr_ratio": 0.0}, "the last step has a learning rate of 0"),
        ({"lr_scheduler": "cosine", "min_lr_ratio": 1.0}, "does not fall"),
        ({"num_steps": 3, "warmup_steps": 2}, None),
        ({"num_steps": 3, "lr_scheduler": "linear"}, None),
        ({"num_steps": 1, "warmup_steps": 1}, None),
    ],
    ids=str,
)
def test_a_schedule_that_hardly_trains_is_said(settings, said):
    lines = remarks(RLConfig(learning_rate=1.0, **settings))
    assert [said in line for line in lines] == [True] * bool(said)
