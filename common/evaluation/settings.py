"""The settings of an evaluation, and their translation into those of a run."""

import re
import typing
from dataclasses import dataclass, field, fields
from datetime import date, datetime

import torch

from common.config import SAMPLERS, RLConfig
from common.data.files import format_of, is_compressed
from common.values import as_declared

# Longer than any prompt or completion.
NO_LIMIT = 2**31
# Padded tokens of a forward pass of a reward model.
REWARD_MODEL_TOKENS = 16384
# Settings that begin with eval_ in a run.
_SAMPLED = ("num_samples", "temperature", "top_p", "top_k")


@dataclass(kw_only=True)
class EvaluationSettings:
    """What to evaluate, and how. Lengths are in tokens."""

    model: list[str]
    """Hub id, folder, or "tiny"; also a run's folder or a checkpoint. Several give one table."""
    task: str
    """math500, aime24, gsm8k, countdown, or a .jsonl, .csv or .parquet file with the columns of one of these; prompts
    for prompts of your own, in --dataset, with your own --reward."""
    adapter: str | None = None
    """Folder of a LoRA adapter of the model."""
    trust_remote_code: bool = False
    """Run Python files that come with the model; without it such a model is refused."""
    dataset: str | None = None
    """Local file, or another hub id, in place of the data of a named task; the data of the task prompts."""
    dataset_split: str | None = None
    """Split or slice of a hub data set; None: that of the named task, else train."""
    num_held_out: int | None = None
    """Evaluate the rows that training with this num_eval_prompts holds out; then the task may be any task of training,
    such as hh_rlhf. None: all rows of a set."""
    write_pass_rates: str | None = None
    """File for how often each prompt was solved, which training reads as prompt_weights. Then the task is one of
    training, and the rows are those that training with num_eval_prompts=num_held_out (None: 256) trains on."""
    num_problems: int | None = None
    """Evaluate only the first num_problems; None: all."""
    prompt_file: str | None = None
    """Text file with {prompt} in it, put around every prompt, as in training."""
    enable_thinking: bool | None = None
    """Passed to the chat template, as in training; None: its default."""
    rewards: list[str] | None = None
    """As in training: rewards of the task by name, reward models, file.py:function or module:function; also
    `--reward NAME WEIGHT`, as often as needed. None: the task's own."""
    reward_weights: list[float] | None = None
    """One weight per reward, of its share in the score; None: the task's, else 1."""
    reward_format: str = "auto"
    """"text", "conversational" or "auto", as in training."""
    reward_time_limit: float = 1.0
    """Seconds a rule may take for one completion; 0: no limits."""
    reward_memory_limit: float = 2.0
    """Gigabytes a rule may use."""
    accuracy: str | None = None
    """The reward whose value 1 means a right answer; it gives accuracy and pass@k. None: the task's, if it has one."""
    date: str | None = None
    """What chat templates that write the date take for today, such as 2026-11-27; None: the start of the run that a
    model comes from, else today."""

    num_samples: int | None = None
    """Completions per problem; None: 8, or 1 with temperature 0."""
    temperature: float | None = None
    """0 is greedy; None: 0.6, or with write_pass_rates that of training, 1."""
    top_p: float = 1.0
    """Of the most likely tokens, those that have this share of the probability together; 1: all."""
    top_k: int = 0
    """0: off."""
    max_completion_length: int | None = None
    """Longer completions are cut off; None: 4096, or half of the model's context if that is less."""
    max_prompt_length: int | None = None
    """Longer prompts are dropped and counted; None: no limit."""
    seed: int = 0
    """Of the sampled completions; the same seed gives the same ones."""

    sampler: str = "vllm"
    """"vllm", or "transformers" for machines without it."""
    dtype: str = "auto"
    """Precision of forward passes: "auto" is bfloat16 on CUDA and float32 on the CPU."""
    vllm_memory_share: float = field(default_factory=lambda: 0.85 if torch.cuda.is_available() else 0.4)
    """Share of the GPU's memory, or of the CPU's free memory, that vLLM may use."""
    vllm_max_num_seqs: int = 256
    """Completions that vLLM samples at the same time."""

    keep_completions: bool = False
    """Keep the completions beside the result, so that the same command with other rewards scores them again."""
    output_dir: str | None = None
    """Folder of the result; None: evaluations/<model>-<task>-<hash of the settings>. With several models the parent
    of their folders."""

    def __post_init__(self) -> None:
        """Check what RLConfig does not.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        if isinstance(self.date, date):  # YAML reads a date without quotes as one
            self.date = self.date.isoformat()
        self.model = [self.model] if isinstance(self.model, str) else self.model
        types = typing.get_type_hints(type(self))
        for name in (each.name for each in fields(self)):
            setattr(self, name, as_declared(name, vars(self)[name], types[name]))
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"sampler={self.sampler!r}: need one of vllm, transformers. Pass --sampler vllm, or transformers on a "
                "machine without vLLM."
            )
        if self.sampler == "vllm_server":
            raise ValueError(
                "sampler=vllm_server: a server has the weights of the run that pushes to it, and an evaluation starts "
                "an engine of its own for each model. Pass --sampler vllm."
            )
        if not self.model:
            raise ValueError("model=[]: need a model to evaluate. Pass --model with a hub id or a folder.")
        if self.adapter is not None and len(self.model) > 1:
            raise ValueError(
                f"adapter={self.adapter} with {len(self.model)} models: an adapter belongs to one base model. Pass "
                "--model with its base only, or add the adapter's folder to the other models."
            )
        if self.num_problems is not None and self.num_problems < 1:
            raise ValueError(
                f"num_problems={self.num_problems}: need at least 1 problem, or there is nothing to measure. Pass "
                "--num_problems 1 or more, or leave it out for all."
            )
        if self.write_pass_rates is not None:
            self._check_pass_rates()
        elif self.num_held_out is not None and self.num_held_out < 1:
            raise ValueError(
                f"num_held_out={self.num_held_out}: need at least 1 row, or there is nothing to measure. Pass the "
                "num_eval_prompts of the training run, or leave it out for all rows of a set."
            )
        if self.date is not None and not _is_date(self.date):
            raise ValueError(f"date={self.date}: need a day in the form of 2026-11-27. Pass --date with one.")
        if self.temperature is None:
            self.temperature = 0.6 if self.write_pass_rates is None else RLConfig.temperature
        if self.num_samples is None:
            self.num_samples = 8 if self.temperature else 1

    def _check_pass_rates(self) -> None:
        """What can be wrong with settings for a file of pass rates; fills in what training holds out."""
        file = f"write_pass_rates={self.write_pass_rates}"
        if format_of(self.write_pass_rates) not in ("jsonl", "ndjson") or is_compressed(self.write_pass_rates):
            raise ValueError(
                f"{file}: JSON lines are written, and training knows them by the name of the file. Pass "
                "--write_pass_rates weights.jsonl."
            )
        if len(self.model) > 1:
            raise ValueError(
                f"{file} with {len(self.model)} models: the file has the pass rates of one, such as the policy that "
                "training begins with. Pass --model with that one."
            )
        if self.temperature == 0 or (self.num_samples is not None and self.num_samples < 2):
            given = "temperature=0" if self.temperature == 0 else f"num_samples={self.num_samples}"
            raise ValueError(
                f"{file} with {given}: how often a prompt is solved needs several samples of it, as training draws "
                "them. Pass --num_samples 8 and leave out --temperature."
            )
        if self.num_held_out is None:
            self.num_held_out = RLConfig.num_eval_prompts
        if self.num_held_out < 0:
            raise ValueError(
                f"num_held_out={self.num_held_out}: need 0 or more. Pass the num_eval_prompts of the training run."
            )


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def as_run_settings(settings: EvaluationSettings, model: str) -> RLConfig:
    """The settings as an RLConfig, which checks them; without a limit, texts of any length fit."""
    names = (
        "trust_remote_code",
        "prompt_file",
        "enable_thinking",
        "seed",
        "sampler",
        "dtype",
        "vllm_memory_share",
        "vllm_max_num_seqs",
    )
    names += ("rewards", "reward_weights", "reward_format", "reward_time_limit", "reward_memory_limit")
    shared = {name: vars(settings)[name] for name in names}
    sampled = {f"eval_{name}": vars(settings)[name] for name in _SAMPLED}
    lengths = {
        "max_prompt_length": settings.max_prompt_length,
        "max_completion_length": settings.max_completion_length,
    }
    given = {name: NO_LIMIT if value is None else value for name, value in lengths.items()}
    try:
        # Nothing is trained: the budget is that of a reward model's passes.
        memory = {"vllm_sleep_level": 0, "max_tokens_per_microbatch": REWARD_MODEL_TOKENS}
        return RLConfig(model=model, **memory, **shared, **sampled, **given)
    except ValueError as error:
        # What a run calls eval_temperature is temperature here.
        raise ValueError(re.sub(rf"\beval_(?=({'|'.join(_SAMPLED)})\b)", "", str(error))) from None
