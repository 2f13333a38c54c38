"""Distillation: settings and start. Any setting can be overridden: `python distill.py --learning_rate 2e-6`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.start import start
from Distill.distill_trainer import DistillConfig, DistillTrainer

SETTINGS = DistillConfig(
    # What to train, on what
    model="Qwen/Qwen2.5-1.5B-Instruct",  # cpu: "tiny"
    trust_remote_code=False,
    task="hh_rlhf",  # cpu: "countdown"
    dataset=None,  # the task's own: Anthropic/hh-rlhf
    dataset_split="train",
    num_eval_prompts=256,
    rewards=None,  # cpu: ["format", "equation"]; names, reward models, file.py:function; None: the task's own
    reward_weights=None,  # cpu: [0.1, 0.9]
    reward_format="auto",
    reward_time_limit=1.0,
    reward_memory_limit=2.0,
    prompt_weights=None,  # file with how often each prompt comes
    prompt_file=None,
    enable_thinking=None,
    # Steps
    num_steps=500,  # cpu: 60
    prompts_per_step=64,  # cpu: 32
    num_generations=4,  # cpu: 8
    num_minibatches=1,
    num_update_epochs=1,
    # Sampling
    sampler="vllm",
    temperature=1.0,
    max_prompt_length=512,  # cpu: 16
    max_completion_length=1024,  # cpu: 240
    max_logprob_diff=None,  # 0.01 in float32, 0.5 in bfloat16; 0: the run goes on with any difference
    # Distillation
    teacher=None,  # hub id, folder, run or LoRA adapter; there is no default
    gamma=0.0,  # 1: a token answers for all that follows it
    reward_coef=0.0,  # weight of the score beside the teacher
    average_over="tokens",
    clip_range=0.2,
    clip_range_high=None,  # as clip_range
    importance_correction="auto",  # for a sampler that rounds in another way: "none", "truncate" or "mask"
    importance_cap=2.0,
    kl_coef=0.0,  # to the reference; the teacher takes its place
    missing_eos_penalty=0.0,
    whiten_advantages=False,  # the teacher says of each token how good it is
    mask_truncated=False,
    # Optimizer
    optimizer="adamw",  # adamw_host: all parameters of a large model, with float32 masters in main memory
    learning_rate=1e-5,  # cpu: 1e-3; ten times that of full training, as usual with LoRA
    lr_scheduler="cosine",
    warmup_steps=10,  # cpu: 2
    min_lr_ratio=0.1,
    adam_beta1=0.9,
    adam_beta2=0.999,  # cpu: 0.98
    weight_decay=0.0,
    max_grad_norm=1.0,
    # LoRA
    use_lora=True,  # cpu: False
    lora_r=64,
    lora_alpha=64,
    lora_target_modules="all-linear",
    load_in_4bit=False,  # True: QLoRA, the base in a quarter of the memory
    # Memory and speed: nothing here changes the result. See common/presets for GPUs of other sizes.
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
    eval_temperature=1.0,
    eval_top_p=1.0,
    eval_top_k=0,
    eval_num_samples=1,
    eval_kl=False,
    early_stopping_patience=0,
    # The run
    preset="auto",  # without a GPU: cpu; it replaces the lines marked "cpu:" that you have not edited
    output_dir=None,  # runs/<algorithm>-<task>-seed<seed>-<hash of the settings>
    resume="auto",
    save_every=50,  # cpu: 20
    save_total_limit=2,
    save_drop_oldest_first=False,
    stop_grace=30.0,  # seconds for the step in hand after SIGTERM or Ctrl-C
    push_to_hub=None,
    report_to=None,  # for example ["wandb"]
    samples_every=5,
    progress=True,
    seed=0,
)


# What else the preset cpu (common/presets/cpu.yaml) replaces: setting -> (value above, value without a GPU).
# A teacher says something of every token, which allows larger steps than rewards do.
EMBEDDED = {"learning_rate": (1e-5, 1e-3)}


if __name__ == "__main__":
    start(DistillTrainer, SETTINGS, embedded=EMBEDDED, script=__file__)
