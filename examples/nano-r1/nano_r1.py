"""nano-r1: an instruction-tuned model learns to think longer on GSM8K, in 4 bits with LoRA, on one small GPU.

Five rules score a completion (common/tasks/gsm8k.py). Any setting: `python nano_r1.py --prompts_per_step 1`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.start import start
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer

SETTINGS = GRPOConfig(
    # What to train, on what
    model="Qwen/Qwen2.5-3B-Instruct",  # cpu: "tiny"
    trust_remote_code=False,
    task="gsm8k",  # cpu: "countdown"
    dataset=None,  # openai/gsm8k
    dataset_split="train",
    num_eval_prompts=256,
    rewards=["correct", "strict_format", "soft_format", "tags", "length"],  # cpu: ["format", "equation"]
    reward_weights=[2.0, 0.5, 0.5, 0.5, 2.0],  # cpu: [0.1, 0.9]
    reward_format="auto",
    reward_time_limit=1.0,
    reward_memory_limit=2.0,
    prompt_weights=None,  # file with how often each prompt comes
    prompt_file=None,
    enable_thinking=None,
    # Steps
    num_steps=250,  # cpu: 60
    prompts_per_step=8,  # cpu: 32; the original has 1, and 1000 steps, which are cheaper but noisier
    num_generations=12,  # cpu: 8
    num_minibatches=1,
    num_update_epochs=1,
    # Sampling
    sampler="vllm",
    temperature=1.0,
    max_prompt_length=256,  # cpu: 16
    max_completion_length=1024,  # cpu: 240
    max_logprob_diff=None,  # 0.01 in float32, 0.5 in bfloat16; 0: the run goes on with any difference
    # GRPO
    scale_by_std=True,  # False: Dr. GRPO
    whiten_rewards=False,
    average_over="rows",  # cpu: "tokens"; which is DAPO; "constant": Dr. GRPO
    clip_range=0.2,
    clip_range_high=None,  # as clip_range; 0.28: DAPO
    importance_correction="auto",  # for a sampler that rounds in another way: "none", "truncate" or "mask"
    importance_cap=2.0,
    kl_coef=0.04,  # cpu: 0.0
    kl_estimator=None,  # k3 in the loss, k1 in the reward
    kl_place="loss",
    whiten_advantages=False,  # the group is the baseline already
    mask_truncated=False,
    missing_eos_penalty=0.0,
    sparse=False,
    keep_per_group=False,
    refill_rounds=0,
    # Optimizer
    optimizer="adamw",  # adamw_host: all parameters of a large model, with float32 masters in main memory
    learning_rate=5e-6,  # cpu: 3e-3
    lr_scheduler="cosine",
    warmup_steps=25,  # cpu: 2; a tenth of the steps
    min_lr_ratio=0.0,  # cpu: 0.1
    adam_beta1=0.9,
    adam_beta2=0.99,  # cpu: 0.98
    weight_decay=0.1,  # cpu: 0.0
    max_grad_norm=0.1,  # cpu: 1.0
    # LoRA
    use_lora=True,
    lora_r=64,
    lora_alpha=64,
    lora_target_modules="all-linear",  # the seven projections of each layer
    load_in_4bit=True,
    # Memory and speed: nothing here changes the result. See common/presets for cards of other sizes.
    max_tokens_per_microbatch="auto",  # cpu: 2048
    gradient_checkpointing=True,  # cpu: False
    offload="auto",
    dtype="auto",
    attn_implementation="auto",
    vllm_memory_share=0.5,
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
    eval_temperature=1.0,
    eval_top_p=1.0,
    eval_top_k=0,
    eval_num_samples=1,
    eval_kl=False,
    early_stopping_patience=0,
    # The run
    preset="auto",  # without a GPU: cpu, the embedded default; it replaces what is marked, unless you edit it
    output_dir=None,  # runs/<algorithm>-<task>-seed<seed>-<hash of the settings>
    resume="auto",
    save_every=125,  # cpu: 20
    save_total_limit=2,
    save_drop_oldest_first=False,
    stop_grace=30.0,  # seconds for the step in hand after SIGTERM or Ctrl-C
    push_to_hub=None,
    report_to=None,  # ["wandb"], say
    samples_every=5,
    progress=True,
    seed=3407,
)

# Without a GPU: the tiny policy of the embedded default, in 4 bits with LoRA too. It cannot read GSM8K, so it learns
# Countdown. setting -> (value above, value without a GPU)
EMBEDDED = {
    "model": ("Qwen/Qwen2.5-3B-Instruct", "tiny"),
    "task": ("gsm8k", "countdown"),
    "rewards": (["correct", "strict_format", "soft_format", "tags", "length"], ["format", "equation"]),
    "reward_weights": ([2.0, 0.5, 0.5, 0.5, 2.0], [0.1, 0.9]),
    "num_steps": (250, 60),
    "prompts_per_step": (8, 32),
    "num_generations": (12, 8),
    "max_prompt_length": (256, 16),
    "max_completion_length": (1024, 240),
    "average_over": ("rows", "tokens"),
    "kl_coef": (0.04, 0.0),
    "learning_rate": (5e-6, 3e-3),
    "warmup_steps": (25, 2),
    "min_lr_ratio": (0.0, 0.1),
    "adam_beta2": (0.99, 0.98),
    "weight_decay": (0.1, 0.0),
    "max_grad_norm": (0.1, 1.0),
    "use_lora": (True, True),
    "load_in_4bit": (True, True),
    "save_every": (125, 20),
}


if __name__ == "__main__":
    start(GRPOTrainer, SETTINGS, embedded=EMBEDDED, script=__file__)
