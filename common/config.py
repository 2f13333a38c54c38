"""The settings that all algorithms share, and their checks.

Every check runs before any model is loaded. How a script reads its settings is in common/cli.py.
"""

import math
import typing
from dataclasses import dataclass, fields

from common.foreign_names import IN_PYTHON, unknown_settings
from common.values import as_declared, module_names

AVERAGES = ("tokens", "rows", "constant")
SCHEDULERS = ("constant", "linear", "cosine")
OFFLOADS = ("auto", "always", "never")
DTYPES = ("auto", "float32", "bfloat16", "fast")
SAMPLERS = ("vllm", "vllm_server", "transformers")
SHARDS = ("none", "full")
OPTIMIZERS = ("adamw", "adamw_host", "adamw_8bit")
KL_ESTIMATORS = ("k1", "k2", "k3")
CORRECTIONS = ("auto", "none", "truncate", "mask")
# What the memory plan decides; see common/memory.
AUTO = "auto"

# The group "Memory and speed": changing these does not change the result of a run, up to rounding.
MEMORY_SETTINGS = (
    "max_tokens_per_microbatch",
    "gradient_checkpointing",
    "offload",
    "dtype",
    "attn_implementation",
    "vllm_memory_share",
    "vllm_sleep_level",
    "vllm_enforce_eager",
    "vllm_max_num_seqs",
)

# Why a clip does nothing, in `idle_settings`.
ON_POLICY = "num_minibatches x num_update_epochs is 1: no step is taken from rollouts of an older policy"

# vLLM silently raises lower temperatures to this, and its log-probs would differ from the trainer's.
LOWEST_TEMPERATURE = 0.01
HIGHEST_TEMPERATURE = 2.0

# Minutes: processes wait for each other while one saves or loads.
_SHORTEST_TIMEOUT, _LONGEST_TIMEOUT = 1.0, 525600.0


@dataclass(frozen=True, kw_only=True)
class OtherModel:
    """A model that an algorithm has beside the policy, as the memory plan counts it.

    Attributes:
        name: in the pool.
        setting: that names what it is made of.
        path: hub id or folder of what it is made of; None: the policy's.
        is_trained: False for one that only gives log-probs of the policy's tokens.
        shares_base: with LoRA, it uses the policy's frozen base, with an adapter and a head of its own.
        replaces_score: what it says of each token is all that is learned, so that completions need no score.
    """

    name: str
    setting: str
    path: str | None = None
    is_trained: bool = True
    shares_base: bool = False
    replaces_score: bool = False


@dataclass(kw_only=True)
class RLConfig:
    """Settings of every algorithm, grouped as in the scripts.

    Counts are totals over all processes; lengths are in tokens.
    """

    # No settings: what a preset replaced, in words for the start of a run, and where each value comes from.
    notes = ()
    origins = {}  # noqa: RUF012  it is replaced, never changed

    # What to train, on what
    model: str = "Qwen/Qwen2.5-1.5B-Instruct"
    """Hub id or folder of the policy; "tiny" and "tiny-r1" are embedded and need no download."""
    trust_remote_code: bool = False
    """Run the Python files that come with the model, for architectures that transformers does not have; read them
    first, since they can do anything that you can."""
    task: str = "countdown"
    """Module of common/tasks that gives prompts, answer columns and rewards."""
    dataset: str | None = None
    """Hub id, or local .jsonl, .json, .csv, .tsv or .parquet file or folder, instead of the task's own data."""
    dataset_split: str = "train"
    """Split or slice of the data set, such as "train[:10%]"."""
    num_eval_prompts: int = 256
    """Prompts held out for evaluation, never trained on."""
    rewards: list[str] | None = None
    """Rewards of the task by name, reward models (hub id or folder), file.py:function or module:function; on the
    command line also `--reward NAME WEIGHT`, as often as needed. None: the task's own."""
    reward_weights: list[float] | None = None
    """One weight per reward; the score is their weighted sum. None: the task's weights."""
    reward_format: str = "auto"
    """What reward functions from files and modules get: "text", "conversational" (chat messages, as trl gives them for
    chat data), or "auto": what their annotations name, else text, and messages if they fail on text."""
    reward_time_limit: float = 1.0
    """Seconds of processor time a rule may take for one completion before it scores 0; ten times that on the clock.
    0: no worker process and no limits."""
    reward_memory_limit: float = 2.0
    """Gigabytes a rule may use."""
    prompt_weights: str | None = None
    """File that says how often each prompt comes, as `python -m common.evaluation --write_pass_rates` writes it; None:
    all equally often."""
    prompt_file: str | None = None
    """Text file that contains {prompt}: each prompt (of a chat, its last user message) is inserted there."""
    enable_thinking: bool | None = None
    """Passed to the chat template, for models that have this switch, such as Qwen3; None: its default."""

    # Steps
    num_steps: int = 200
    """Rollout-and-update iterations."""
    prompts_per_step: int = 64
    """Prompts sampled in one step."""
    num_generations: int = 8
    """Completions per prompt, G."""
    num_minibatches: int = 1
    """Optimizer steps per pass over the rollouts of a step."""
    num_update_epochs: int = 1
    """Passes over the rollouts of a step."""

    # Sampling. Training samples from the policy itself (temperature only): with top-p or top-k, the policy's log-probs
    # would not match the distribution that was sampled from.
    sampler: str = "vllm"
    """"vllm"; "vllm_server": a server of vLLM with GPUs of its own, at sampler_url; or "transformers" for machines
    without vLLM."""
    temperature: float = 1.0
    """Above 0; log-probs are taken at the same temperature."""
    max_prompt_length: int = 512
    """Longer prompts are dropped and counted."""
    max_completion_length: int = 1024
    """Longer completions are cut off."""
    max_logprob_diff: float | None = None
    """Most that log-probs of sampler and trainer may differ by on average: with more, the run stops before its policy
    learns from the completions. None: 0.01 in float32, 0.5 in bfloat16; 0: any difference is taken, with a warning."""

    # Loss
    kl_coef: float = 0.0
    """Weight of the KL to the reference; 0 loads no reference."""
    average_over: str = "tokens"
    """What the loss is a mean over: "tokens", "rows" or "constant" (max_completion_length x rows)."""
    whiten_advantages: bool = False
    """Scale the advantages of a step to mean 0 and variance 1 over all tokens."""
    mask_truncated: bool = False
    """Exclude completions that reached the length limit from the loss."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a completion without an end token, before the score is used."""

    # Optimizer
    optimizer: str = "adamw"
    """"adamw": weights and moments in float32 on the device; "adamw_host": weights as forward passes read them there,
    float32 masters and moments in main memory; "adamw_8bit": float32 weights, moments in 8 bits (bitsandbytes)."""
    learning_rate: float = 1e-6
    lr_scheduler: str = "constant"
    """"constant"; "linear" or "cosine" fall to min_lr_ratio at the last step."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of learning_rate, for "linear" and "cosine"."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    """AdamW's, of matrices and embeddings; biases, norms and other vectors do not decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: no clipping."""

    # LoRA
    use_lora: bool = False
    """Train low-rank adapters; the reference is then the policy with its adapter off."""
    lora_r: int = 64
    lora_alpha: int = 64
    lora_target_modules: str = "all-linear"
    """"all-linear", or names of modules, separated by commas or as a list."""
    load_in_4bit: bool = False
    """Keep the frozen base in 4 bits (QLoRA): a quarter of its memory; needs use_lora and bitsandbytes."""

    # Memory and speed: nothing here changes the result
    max_tokens_per_microbatch: int | str = AUTO
    """Padded tokens per forward pass; larger is faster and needs more memory. "auto": what the memory plan has room
    for. A longer row runs alone."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, much less memory."""
    offload: str = "auto"
    """Move idle models off the device: "auto" (only if they do not all fit), "always" or "never"."""
    dtype: str = "auto"
    """Precision of forward passes: "auto" is bfloat16 on CUDA and float32 on the CPU; "fast" is bfloat16 also on a CPU
    that computes in it, for reward models too. Trained weights stay float32."""
    attn_implementation: str = "auto"
    """Attention of transformers: "auto" is sdpa, or what else computes the model's own attention where sdpa leaves out
    a part of it; or "sdpa", "eager", "flash_attention_2", "flex_attention"."""
    vllm_memory_share: float | str = AUTO
    """Share of the GPU's memory that vLLM may use for its weights and its cache; on a CPU, share of the free memory
    that its cache may take, which is no larger than the completions of the largest request need. "auto": what the
    memory plan leaves it, but no more than it can use."""
    vllm_sleep_level: int = 1
    """What vLLM frees while models are in use: 0 nothing, 1 its cache (weights move to the CPU), 2 weights too."""
    vllm_enforce_eager: bool = False
    """Do not capture CUDA graphs: starts faster, samples slower."""
    vllm_max_num_seqs: int = 256
    """Completions that vLLM samples at the same time."""

    # Several GPUs: the number of processes changes no result
    shard: str = "none"
    """"none": every process has whole models; "full": the tensors of policy, reference and value model are spread over
    all processes (FSDP2), so that more GPUs allow a larger model. Several processes only."""
    vllm_tensor_parallel: int = 1
    """So many processes share one engine of vLLM, each with a part of every weight, for a model that does not fit on
    one GPU."""
    sampler_url: str | None = None
    """Address of the server of sampler=vllm_server, such as http://127.0.0.1:8000."""
    sampling_lag: int = 0
    """1: the next step's completions are sampled while this step trains, from the policy of one step earlier; the
    ratio is then to the sampler's log-probs. 0: every step samples from the policy it trains."""
    process_timeout: float = 10.0
    """Minutes for which a process waits for another one that hangs before the run ends with a message; at least 1."""

    # Evaluation on the held-out prompts
    eval_every: int = 25
    """Steps between evaluations; one more before the first step and one after the last. 0: never."""
    eval_temperature: float = 1.0
    """0 is greedy."""
    eval_top_p: float = 1.0
    eval_top_k: int = 0
    """0: off."""
    eval_num_samples: int = 1
    """Completions per held-out prompt; more than one adds pass@k."""
    eval_kl: bool = False
    """Measure the KL to the reference on the held-out completions too; loads the reference even at kl_coef 0."""
    early_stopping_patience: int = 0
    """Stop after this many evaluations without a new best; 0: never."""

    # The run
    preset: str = "auto"
    """Settings of common/presets: a name, "none", or "auto": cpu without a CUDA GPU, none with one."""
    output_dir: str | None = None
    """The run's folder. None: runs/<algorithm>-<task>-seed<seed>-<hash of the settings>."""
    resume: str = "auto"
    """"auto" continues the run in output_dir if there is one; "never" refuses an existing folder; "extend" also takes
    a larger num_steps where lr_scheduler is not constant: the schedule of the new length holds from there on."""
    save_every: int = 50
    """Steps between checkpoints; 0: only the final model."""
    save_total_limit: int = 2
    """Checkpoints kept in addition to the best one."""
    save_drop_oldest_first: bool = False
    """Where the next checkpoint does not fit on the disk, first delete older ones: all but the latest and the best."""
    stop_grace: float = 30.0
    """Seconds that the step in hand may still take after SIGTERM, SIGUSR1, SIGHUP or Ctrl-C; then it is left, unless
    its update has begun. A checkpoint is written either way."""
    push_to_hub: str | None = None
    """Hub id that the final model is uploaded to."""
    report_to: list[str] | None = None
    """Trackers of Accelerate in addition to metrics.jsonl, such as wandb or tensorboard."""
    samples_every: int = 5
    """Steps between entries in samples.jsonl; 0: never."""
    progress: bool = True
    """Show a progress bar."""
    seed: int = 0
    """Everything random is a function of (seed, step, row)."""

    def __new__(cls, **settings: object) -> typing.Self:
        """Say of unknown settings what they are called here; Python itself would not."""
        names, owner = [field.name for field in fields(cls)], cls.__name__
        message = unknown_settings(settings, names, where=f"in {owner}(...)", form=IN_PYTHON, owner=owner)
        if message:
            raise TypeError(message)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check each setting and the settings against each other.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        self.lora_target_modules = module_names(self.lora_target_modules)
        # As transformers has it: one tracker without a list, or the word none.
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        self.report_to = None if self.report_to == ["none"] else self.report_to
        self._check_types()
        self._check_ranges()
        self._check_choices()
        self._check_batch()

    @property
    def completions_per_step(self) -> int:
        """Rows of a step over all processes."""
        return self.prompts_per_step * self.num_generations

    @property
    def completions_at_once(self) -> int:
        """Completions of the largest request of a step, over all processes: on the CPU, vLLM has memory for these.

        An algorithm that samples more at once, such as continuations, says here how many at most.
        """
        return self.completions_per_step

    @property
    def other_models(self) -> tuple[OtherModel, ...]:
        """The models that the algorithm has beside the policy, for the memory plan; most have none."""
        return ()

    @property
    def needs_score(self) -> bool:
        """False where another model's judgement takes the place of rewards, which then are only measured."""
        return not any(other.replaces_score for other in self.other_models)

    @property
    def takes_one_step(self) -> bool:
        """True when each rollout makes one optimizer step."""
        return self.num_minibatches * self.num_update_epochs == 1

    @property
    def trains_on_policy(self) -> bool:
        """True when the one optimizer step of a rollout starts at the policy that sampled: the ratio is then 1."""
        return self.takes_one_step and not self.sampling_lag

    @property
    def makes_old_logprobs(self) -> bool:
        """True when log-probs under the policy that sampled take a forward pass of their own.

        With a lag that policy is gone, and the sampler's log-probs take their place.
        """
        return not self.takes_one_step and not self.sampling_lag

    @property
    def why_no_lag(self) -> str:
        """Why the completions of a step must come from the policy that the step trains; empty: they need not.

        An algorithm that samples more in its step, and compares it with the completions, says it here.
        """
        return ""

    def scheduled_rate(self, step: int) -> float:
        """Learning rate of a step, from 1: linear warm-up, then constant, or decay to its minimum at the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.lr_scheduler == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(self.num_steps - self.warmup_steps, 1)
        decay = 1 - progress if self.lr_scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * decay)

    def idle_settings(self) -> dict[str, str]:
        """The settings that do nothing next to the others, whatever their value, each with the reason.

        An algorithm adds its own. A run names those of them that its user set himself; see `remarks`.
        """
        idle = {}
        if not self.use_lora:
            idle |= dict.fromkeys(("lora_r", "lora_alpha", "lora_target_modules"), "use_lora is false")
        if self.sampler != "vllm_server":
            idle["sampler_url"] = f"sampler is {self.sampler}"
        if self.sampler == "vllm_server":  # --serve reads the others
            idle["vllm_sleep_level"] = "the server has devices of its own"
        elif self.sampler != "vllm":
            names = [field.name for field in fields(self) if field.name.startswith("vllm_")]
            idle |= dict.fromkeys(names, f"sampler is {self.sampler}")
        if self.lr_scheduler == "constant":
            idle["min_lr_ratio"] = "lr_scheduler is constant"
        if not any(":" in name for name in self.rewards or ()):
            idle["reward_format"] = "no reward is a function from a file or module"
        if not self.reward_time_limit:
            idle["reward_memory_limit"] = "reward_time_limit is 0, which switches both limits off"
        if not self.save_every:
            idle |= dict.fromkeys(("save_total_limit", "save_drop_oldest_first"), "save_every is 0")
        if self.eval_temperature == 0:
            idle |= dict.fromkeys(("eval_top_p", "eval_top_k"), "eval_temperature is 0: the likeliest token is taken")
        if not (self.eval_every and self.num_eval_prompts):
            names = ("eval_temperature", "eval_top_p", "eval_top_k", "eval_num_samples", "eval_kl")
            idle |= dict.fromkeys(names, "nothing is evaluated")
        return idle

    def _check_types(self) -> None:
        """Convert values to their declared types: YAML reads 2e-6 as text and 1 as an integer."""
        declared = typing.get_type_hints(type(self))  # not field.type: HfArgumentParser removes None from it
        for field in fields(self):
            setattr(self, field.name, as_declared(field.name, getattr(self, field.name), declared[field.name]))

    def _check_ranges(self) -> None:
        at_least_one = (
            "num_steps prompts_per_step num_generations num_minibatches num_update_epochs max_prompt_length "
            "max_completion_length lora_r lora_alpha save_total_limit eval_num_samples "
            "vllm_max_num_seqs vllm_tensor_parallel"
        )
        not_negative = (
            "num_eval_prompts reward_time_limit kl_coef missing_eos_penalty warmup_steps min_lr_ratio weight_decay "
            "max_grad_norm eval_every eval_temperature eval_top_k early_stopping_patience save_every samples_every "
            "learning_rate stop_grace"
        )
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1. Pass --{name} 1 or more.")
        for name in not_negative.split():
            if not getattr(self, name) >= 0 or math.isinf(getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)}: need a finite number, 0 or more. Pass --{name} 0, for example."
                )
        if not LOWEST_TEMPERATURE <= self.temperature <= HIGHEST_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature}: training divides logits by it and needs random completions, so it "
                f"must be in [{LOWEST_TEMPERATURE}, {HIGHEST_TEMPERATURE}], the range of vLLM. Pass "
                "--temperature 1.0; greedy decoding is for evaluation: --eval_temperature 0."
            )
        if self.eval_temperature and not LOWEST_TEMPERATURE <= self.eval_temperature <= HIGHEST_TEMPERATURE:
            raise ValueError(
                f"eval_temperature={self.eval_temperature}: need 0 (greedy) or a number in [{LOWEST_TEMPERATURE}, "
                f"{HIGHEST_TEMPERATURE}], the range of vLLM. Pass --eval_temperature 1.0, for example."
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need a number in [0, 1). Pass --{name} 0.9.")
        if not 0 < self.reward_memory_limit < math.inf:
            raise ValueError(
                f"reward_memory_limit={self.reward_memory_limit}: need gigabytes above 0, or no rule could run. "
                "Pass --reward_memory_limit 2; --reward_time_limit 0 switches both limits off."
            )
        if self.max_logprob_diff is not None and not 0 <= self.max_logprob_diff < math.inf:
            raise ValueError(
                f"max_logprob_diff={self.max_logprob_diff}: need a finite number, 0 or more. Pass --max_logprob_diff "
                "0 to go on with any difference, or leave it out."
            )
        if self.min_lr_ratio > 1:
            raise ValueError(
                f"min_lr_ratio={self.min_lr_ratio}: it is the share of learning_rate that is left at the end, so it "
                "must be in [0, 1]. Pass --min_lr_ratio 0.1."
            )
        if not _SHORTEST_TIMEOUT <= self.process_timeout <= _LONGEST_TIMEOUT:
            raise ValueError(
                f"process_timeout={self.process_timeout}: need minutes, at least 1, since one process saves and loads "
                f"while the others wait, and at most {_LONGEST_TIMEOUT:g}, a year. Pass --process_timeout 10."
            )
        if not 0 < self.eval_top_p <= 1:
            raise ValueError(f"eval_top_p={self.eval_top_p}: need a share in (0, 1]. Pass --eval_top_p 0.9.")
        budget, share = self.max_tokens_per_microbatch, self.vllm_memory_share
        if budget != AUTO and not (isinstance(budget, int) and budget >= 1):
            raise ValueError(
                f"max_tokens_per_microbatch={budget!r}: need a number of tokens, at least 1, or auto, which the "
                "memory plan decides. Pass --max_tokens_per_microbatch auto, or 1 or more."
            )
        if share != AUTO and not (isinstance(share, float) and 0 < share <= 1):
            raise ValueError(
                f"vllm_memory_share={share!r}: need a share in (0, 1], or auto, which the memory plan decides. Pass "
                "--vllm_memory_share auto, or 0.4."
            )

    def _check_choices(self) -> None:
        choices = {
            "sampler": SAMPLERS,
            "shard": SHARDS,
            "sampling_lag": (0, 1),
            "optimizer": OPTIMIZERS,
            "lr_scheduler": SCHEDULERS,
            "average_over": AVERAGES,
            "offload": OFFLOADS,
            "dtype": DTYPES,
            "resume": ("auto", "never", "extend"),
            "reward_format": ("auto", "text", "conversational"),
            "vllm_sleep_level": (0, 1, 2),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                shown = ", ".join(map(str, allowed))
                raise ValueError(f"{name}={getattr(self, name)!r}: need one of {shown}. Pass --{name} {allowed[0]}.")
        if self.sampling_lag and self.why_no_lag:
            raise ValueError(
                f"sampling_lag={self.sampling_lag}: completions would come from the policy of one step earlier, and "
                f"{self.why_no_lag}. Pass --sampling_lag 0, or use an algorithm that samples once in a step, such as "
                "GRPO or RLOO."
            )
        if self.reward_weights is not None and self.rewards is None:
            raise ValueError(
                f"reward_weights={self.reward_weights} without rewards: each weight belongs to a named reward. "
                "Pass --rewards too, in the same order."
            )
        if self.load_in_4bit and not self.use_lora:
            raise ValueError(
                "load_in_4bit without use_lora: weights in 4 bits are frozen, so training needs an adapter. "
                "Pass --use_lora true, or leave out --load_in_4bit."
            )
        if str(self.push_to_hub).lower() in ("true", "false", "yes", "no"):
            raise ValueError(
                f"push_to_hub={self.push_to_hub!r}: need the hub id that the final model is uploaded to. Pass "
                "--push_to_hub me/my-model, or leave it out for no upload."
            )
        if self.rewards == []:
            raise ValueError(
                "rewards=[]: completions need a score, so at least one reward. Pass --rewards with names, or leave it "
                "out for all rewards of the task."
            )
        if not all(map(math.isfinite, self.reward_weights or [])):
            raise ValueError(
                f"reward_weights={self.reward_weights}: need finite numbers, since the score is a sum of them. Pass "
                "--reward_weights with one number for each reward."
            )
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"{len(self.reward_weights)} reward_weights for {len(self.rewards)} rewards: need one weight for each "
                f"of {', '.join(self.rewards)}. Pass as many weights as rewards."
            )
        if self.eval_num_samples > 1 and self.eval_temperature == 0:
            raise ValueError(
                f"eval_num_samples={self.eval_num_samples} with eval_temperature=0: greedy completions of a prompt "
                "are all the same, so more than one adds nothing. Pass --eval_temperature 1.0 or --eval_num_samples 1."
            )
        sampled_alike = self.eval_temperature == self.temperature and self.eval_top_p == 1 and self.eval_top_k == 0
        if self.eval_kl and not sampled_alike:
            raise ValueError(
                f"eval_kl with eval_temperature={self.eval_temperature}, eval_top_p={self.eval_top_p}, eval_top_k="
                f"{self.eval_top_k}: the KL is a mean over completions of the policy that is trained, and these come "
                f"from another distribution. Pass --eval_temperature {self.temperature} --eval_top_p 1 --eval_top_k "
                "0, or --eval_kl false."
            )
        if self.early_stopping_patience and not (self.eval_every and self.num_eval_prompts):
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} without evaluation: it counts evaluations "
                "without a new best. Pass --eval_every 25 and --num_eval_prompts 256, for example."
            )

    def _check_batch(self) -> None:
        if self.completions_per_step % self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} with prompts_per_step={self.prompts_per_step} x "
                f"num_generations={self.num_generations} = {self.completions_per_step} rows: mini-batches must be "
                "equal, so that each optimizer step weighs the same. Pass a divisor of the number of rows."
            )


@dataclass(kw_only=True)
class ClippedConfig(RLConfig):
    """The clip of PPO's surrogate and the weights of tokens, for the algorithms that follow the policy gradient."""

    clip_range: float = 0.2
    """How far a probability ratio may fall below 1 before its gradient stops; 1: as far as it does."""
    clip_range_high: float | None = None
    """How far it may rise above 1; None: clip_range. DAPO's clip-higher uses 0.28."""
    importance_correction: str = "auto"
    """How far the loss makes up for a sampler whose probabilities are not exactly the trainer's: "none"; "truncate"
    weighs tokens by their ratio, cut to importance_cap; "mask" leaves out tokens whose ratio is beyond it. "auto":
    truncate in bfloat16 on CUDA, else none."""
    importance_cap: float = 2.0
    """Largest weight of "truncate", at least 1; "mask" keeps ratios from 1 / importance_cap to importance_cap."""

    def __post_init__(self) -> None:
        """Check the clip and the weights after the shared settings.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        if not 0 < self.clip_range <= 1 or (self.clip_range_high is not None and not self.clip_range_high > 0):
            raise ValueError(
                f"clip_range={self.clip_range}, clip_range_high={self.clip_range_high}: the ratio is kept in "
                "[1 - clip_range, 1 + clip_range_high], so the first must be in (0, 1] and the second above 0. Pass "
                "--clip_range 0.2."
            )
        if self.importance_correction not in CORRECTIONS:
            raise ValueError(
                f"importance_correction={self.importance_correction!r}: need one of {', '.join(CORRECTIONS)}. Pass "
                "--importance_correction truncate."
            )
        if not 1 <= self.importance_cap < math.inf:
            raise ValueError(
                f"importance_cap={self.importance_cap}: where sampler and trainer agree the weight is 1, so the "
                "largest one must be a finite number, 1 or more. Pass --importance_cap 2."
            )
        if self.importance_correction == "mask" and self.importance_cap == 1:
            raise ValueError(
                "importance_cap=1.0 with importance_correction=mask: only tokens on which sampler and trainer agree "
                "to the last bit would be trained on. Pass --importance_cap 2."
            )

    @property
    def clip_ranges(self) -> tuple[float, float]:
        """How far the ratio may fall, and rise."""
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high

    def idle_settings(self) -> dict[str, str]:
        """Those of RLConfig, the clip where nothing can be clipped, and the cap where no weight is used."""
        idle = super().idle_settings()
        if self.trains_on_policy:
            idle |= dict.fromkeys(("clip_range", "clip_range_high"), ON_POLICY)
        if self.importance_correction == "none":
            idle["importance_cap"] = "importance_correction is none: it only says what the metric weight_cut counts"
        if self.sampling_lag:
            reason = "sampling_lag is 1: the ratio is to the sampler's log-probs, which corrects for all of it"
            idle |= dict.fromkeys(("importance_correction", "importance_cap"), reason)
        return idle


@dataclass(kw_only=True)
class PlacedKLConfig(ClippedConfig):
    """Where the KL to the reference acts, for the algorithms that have the choice."""

    kl_place: str = "reward"
    """"reward": every token pays its KL; "loss": the KL is a term of the loss."""
    kl_estimator: str | None = None
    """"k2" or "k3" in the loss, "k1" in the reward; None: k3, or k1."""

    def __post_init__(self) -> None:
        """Check place and estimator after the clip.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        if self.kl_estimator not in (None, *KL_ESTIMATORS) or self.kl_place not in ("loss", "reward"):
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r}, kl_place={self.kl_place!r}: need one of "
                f"{', '.join(KL_ESTIMATORS)} and one of loss, reward. Pass --kl_estimator k3 --kl_place loss."
            )
        if self.kl_place == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator=k1 in the loss: its gradient has mean zero, so it adds noise and holds the policy "
                "nowhere. Pass --kl_estimator k3 or k2, or --kl_place reward."
            )
        if self.kl_place == "reward" and self.kl_estimator in ("k2", "k3"):
            raise ValueError(
                f"kl_estimator={self.kl_estimator} in the reward: only k1's gradient is that of the KL there; k2's "
                "and k3's are small and may point away from the reference. Pass --kl_estimator k1 or --kl_place loss."
            )

    @property
    def has_kl_in_loss(self) -> bool:
        """True if the loss has a term for the KL to the reference."""
        return bool(self.kl_coef) and self.kl_place == "loss"

    def idle_settings(self) -> dict[str, str]:
        """Those of every clipped algorithm, and how a KL is taken where none is."""
        idle = super().idle_settings()
        if not self.kl_coef:
            idle |= dict.fromkeys(("kl_estimator", "kl_place"), "kl_coef is 0")
        return idle


def check_discount(config: RLConfig, *names: str) -> None:
    """Raise a ValueError for a discount, such as gamma, that is outside [0, 1]."""
    for name in names:
        value = vars(config)[name]
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: it discounts later rewards, so it must be in [0, 1]. Pass --{name} 1.")


def check_group(num_generations: int, reason: str) -> None:
    """Raise a ValueError, with the algorithm's reason, if there is only one completion per prompt."""
    if num_generations < 2:
        raise ValueError(
            f"num_generations={num_generations}: {reason}, so it needs at least 2. Pass --num_generations 8, or use "
            "an algorithm with another baseline."
        )


def check_not_negative(config: RLConfig, name: str) -> None:
    """Raise a ValueError for a count below 0."""
    if vars(config)[name] < 0:
        raise ValueError(f"{name}={vars(config)[name]}: need 0 or more. Pass --{name} 0 for none.")


def check_kept_rows(config: RLConfig, who: str) -> None:
    """Raise a ValueError if training on one completion per prompt, which `who` does, makes unequal mini-batches."""
    if config.prompts_per_step % config.num_minibatches:
        raise ValueError(
            f"num_minibatches={config.num_minibatches}: {who} trains on one completion of each of prompts_per_step="
            f"{config.prompts_per_step} prompts, and mini-batches must be equally large. Pass a divisor of it."
        )


def check_whiten_rewards(config: RLConfig, *names: str) -> None:
    """Raise a ValueError for whiten_rewards with a setting that takes its effect away."""
    for name in names:
        if vars(config)["whiten_rewards"] and vars(config)[name]:
            raise ValueError(
                f"whiten_rewards with {name}: advantages are divided by their own deviation, so a factor that all "
                f"rewards have in common cancels. Pass --whiten_rewards false, or --{name} false."
            )
