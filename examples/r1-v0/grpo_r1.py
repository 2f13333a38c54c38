"""R1-Zero in small: a base model learns to reason from two rules. Any setting: `python grpo_r1.py --kl_coef 0.001`.

`--task math` trains on MetaMathQA and evaluates on MATH-500. Without a GPU a tiny policy learns to search.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from r1_figure import FIGURE_FILE, write_figure

from common.cli import parse_config, run_script
from common.start import how_to_go_on, prepare, report
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer

SETTINGS = GRPOConfig(
    # What to train, on what
    model="Qwen/Qwen2.5-1.5B",  # cpu: "tiny-r1"; a base model, not trained to reason in tags
    trust_remote_code=False,
    task="countdown",
    dataset="Jiayi-Pan/Countdown-Tasks-3to4",  # cpu: "generated-3to4"
    dataset_split="train",
    num_eval_prompts=500,  # cpu: 512
    rewards=["format", "equation"],  # the format, and the right result with every number once
    reward_weights=[1.0, 1.0],  # cpu: [0.1, 0.9]
    reward_format="auto",
    reward_time_limit=1.0,
    reward_memory_limit=2.0,
    prompt_weights=None,  # file with how often each prompt comes
    prompt_file=None,
    enable_thinking=None,
    # Steps
    num_steps=1000,  # cpu: 80
    prompts_per_step=16,  # cpu: 32
    num_generations=4,  # cpu: 8
    num_minibatches=1,  # one optimizer step per rollout: on-policy, so that no ratio is ever clipped
    num_update_epochs=1,
    # Sampling
    sampler="vllm",
    temperature=1.0,
    max_prompt_length=256,  # cpu: 16
    max_completion_length=1024,  # cpu: 360
    max_logprob_diff=None,  # 0.01 in float32, 0.5 in bfloat16; 0: the run goes on with any difference
    # GRPO
    scale_by_std=True,
    whiten_rewards=False,
    average_over="tokens",  # the mean over rows would favour short right answers and long wrong ones
    clip_range=0.2,
    clip_range_high=None,
    importance_correction="auto",  # for a sampler that rounds in another way: "none", "truncate" or "mask"
    importance_cap=2.0,
    kl_coef=0.0,  # sparse drops rows, whose KL would be missing; and no reference model is needed
    kl_estimator=None,
    kl_place="loss",
    whiten_advantages=False,
    mask_truncated=False,
    missing_eos_penalty=0.0,
    sparse=True,  # groups that are all right or all wrong teach nothing and cost nothing
    keep_per_group=False,
    refill_rounds=0,
    # Optimizer
    optimizer="adamw",  # adamw_host: all parameters of a large model, with float32 masters in main memory
    learning_rate=1e-6,  # cpu: 3e-4
    lr_scheduler="constant",  # cpu: "cosine"
    warmup_steps=0,  # cpu: 2
    min_lr_ratio=0.1,
    adam_beta1=0.9,
    adam_beta2=0.999,  # cpu: 0.98
    weight_decay=0.0,
    max_grad_norm=1.0,
    # LoRA: README.md has the settings for a card of 24 GB
    use_lora=False,
    lora_r=64,
    lora_alpha=64,
    lora_target_modules="all-linear",
    load_in_4bit=False,
    # Memory and speed: nothing here changes the result. See common/presets for cards of other sizes.
    max_tokens_per_microbatch="auto",  # cpu: 2048
    gradient_checkpointing=True,  # cpu: False
    offload="auto",
    dtype="auto",
    attn_implementation="auto",
    vllm_memory_share="auto",
    vllm_sleep_level=1,
    vllm_enforce_eager=False,
    vllm_max_num_seqs=256,
    # Several GPUs: see docs/several-gpus.md. The number of processes changes no result.
    shard="none",  # "full": policy, reference and value model are spread over all processes
    vllm_tensor_parallel=1,  # processes that share one engine, for a model that does not fit on one GPU
    sampler_url=None,  # of a server of sampler="vllm_server", such as "http://127.0.0.1:8000"
    sampling_lag=0,  # 1: the next step's completions are sampled while this one trains
    process_timeout=10.0,  # minutes for which processes wait for one that hangs
    # Evaluation on the held-out prompts
    eval_every=25,  # cpu: 10
    eval_temperature=0.3,  # cpu: 1.0
    eval_top_p=1.0,
    eval_top_k=0,
    eval_num_samples=1,
    eval_kl=False,
    early_stopping_patience=0,
    # The run
    preset="auto",  # without a GPU: cpu, with EMBEDDED below
    output_dir=None,  # runs/<algorithm>-<task>-seed<seed>-<hash of the settings>
    resume="auto",
    save_every=50,  # cpu: 20
    save_total_limit=2,
    save_drop_oldest_first=False,
    stop_grace=30.0,  # seconds for the step in hand after SIGTERM or Ctrl-C
    push_to_hub=None,
    report_to=None,  # ["wandb"], say
    samples_every=5,
    progress=True,
    seed=0,
)

# Other settings with --task math; data and rewards are the task's own: MetaMathQA, the last box, MATH-500.
MATH = {
    "num_steps": 200,
    "prompts_per_step": 128,
    "num_generations": 4,
    "max_prompt_length": 512,
    "max_completion_length": 3000,  # the longest for which MATH-500's prompts fit into a context of 4096
    "eval_every": 10,
    "eval_temperature": 0.0,  # greedy, as MATH-500 is usually reported
}
# Without a GPU: generated problems with three and four numbers, and a tiny policy that can search but gives up early.
# Like the demo (common/presets/cpu.yaml), but with longer tries and more room for them.
# setting -> (value above, value without a GPU)
EMBEDDED = {
    "model": ("Qwen/Qwen2.5-1.5B", "tiny-r1"),
    "task": ("countdown", "countdown"),
    "dataset": ("Jiayi-Pan/Countdown-Tasks-3to4", "generated-3to4"),
    "num_eval_prompts": (500, 512),
    "rewards": (["format", "equation"], ["format", "equation"]),
    "reward_weights": ([1.0, 1.0], [0.1, 0.9]),
    "num_steps": (1000, 80),
    "prompts_per_step": (16, 32),
    "max_prompt_length": (256, 16),
    "max_completion_length": (1024, 360),
    "kl_coef": (0.0, 0.0),
    "learning_rate": (1e-6, 3e-4),
    "lr_scheduler": ("constant", "cosine"),
    "warmup_steps": (0, 2),
    "use_lora": (False, False),
    "eval_temperature": (0.3, 1.0),
}

# Without a GPU, --task math uses the whole context of a tiny policy: enough to try the task, not to learn it.
MATH_EMBEDDED = EMBEDDED | {
    "model": ("Qwen/Qwen2.5-1.5B", "tiny"),
    "num_steps": (200, 60),
    "prompts_per_step": (128, 32),
    "max_prompt_length": (512, 384),
    "max_completion_length": (3000, 128),
    "eval_temperature": (0.0, 0.0),
}


def parse(args: list[str] | None = None) -> GRPOConfig:
    """The settings above for the chosen task; `args` as in `parse_config`."""
    config = parse_config(SETTINGS, embedded=EMBEDDED, script=__file__, args=args)
    if config.task == "math":
        config = parse_config(replace(SETTINGS, **MATH), embedded=MATH_EMBEDDED, script=__file__, args=args)
    return config


def main() -> None:
    """Train with the settings above, and draw accuracy and response length into the run's folder."""
    trainer = prepare(GRPOTrainer, parse())
    report(trainer)
    if trainer.accelerator.is_main_process:
        figure = trainer.run.folder / FIGURE_FILE
        write_figure([trainer.run.folder], figure)
        print(f"accuracy and response length: {figure.resolve()}")


if __name__ == "__main__":
    run_script(main, interrupted=lambda: how_to_go_on(GRPOTrainer, parse()))
