"""Whether a model can be trained: ``python -m common.check_model NAME [--run]``, the first command for a new model.

Without --run it reads configuration and tokenizer alone, and prints what a run will meet: a table and a verdict. With
--run it loads the model, samples eight completions, and compares the log-probs of sampler and trainer twice: with the
model's own weights, and after the weights have changed.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import math
import sys
import textwrap
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from common.cli import parse_settings, run_script
from common.config import RLConfig
from common.host import host_memory
from common.terminal import printable

if TYPE_CHECKING:
    import torch
    import transformers

# Each of these is one run of the table's last rows.
_RUNS = {
    "vLLM, full": {"sampler": "vllm", "use_lora": False},
    "vLLM, LoRA": {"sampler": "vllm", "use_lora": True},
    "transformers, full": {"sampler": "transformers", "use_lora": False},
    "transformers, LoRA": {"sampler": "transformers", "use_lora": True},
}
_NAME_WIDTH, _REASON_WIDTH = 20, 160

# The largest mean |log-prob of the sampler - log-prob of the trainer| that rounding explains. In float32, 3e-6 was
# measured over all architectures that agree.
_MAX_DIFF = {"torch.float32": 1e-5, "torch.bfloat16": 0.1}


@dataclass(kw_only=True)
class CheckSettings:
    """Which model to check, and for what run; the defaults are those of a run."""

    model: str
    """Hub id, folder, or "tiny"; also without --model, as the first word."""
    trust_remote_code: bool = RLConfig.trust_remote_code
    """Run the Python files that come with the model, as in a run."""
    run: bool = False
    """Load it, sample eight completions, and compare the log-probs of sampler and trainer."""
    sampler: str = RLConfig.sampler
    """"vllm" or "transformers"."""
    use_lora: bool = RLConfig.use_lora
    """Train an adapter."""
    lora_r: int = RLConfig.lora_r
    lora_target_modules: str = RLConfig.lora_target_modules
    """"all-linear", or names of modules, separated by commas."""
    load_in_4bit: bool = RLConfig.load_in_4bit
    """Keep the frozen base in 4 bits; needs use_lora."""
    temperature: float = RLConfig.temperature
    max_prompt_length: int | None = None
    """In tokens; None: 512, or half of the model's context if that is less."""
    max_completion_length: int | None = None
    """In tokens, --run samples fewer; None: 1024, or half of the model's context if that is less."""
    dtype: str = RLConfig.dtype
    """Precision of forward passes: "auto" is bfloat16 on CUDA and float32 on the CPU."""
    attn_implementation: str = RLConfig.attn_implementation
    """As in a run."""
    vllm_memory_share: float = 0.4
    """As in a run, where the memory plan may choose it."""

    def as_run_settings(self, context: int | None = None) -> RLConfig:
        """The settings of the run that this is about, checked.

        Args:
            context: tokens that the model has room for; None: without a limit.

        Raises:
            ValueError: for a value that a run refuses.
        """
        if self.sampler == "vllm_server":
            raise ValueError(
                "sampler=vllm_server: whether a server takes the model it says itself when it starts, by the rules of "
                "sampler=vllm. Pass --sampler vllm, which checks the same here."
            )
        given = {name: value for name, value in asdict(self).items() if name != "run"}
        for name in ("max_prompt_length", "max_completion_length"):
            if given[name] is None:
                default = vars(RLConfig)[name]
                given[name] = default if context is None else min(default, context // 2)
        return RLConfig(**given, max_tokens_per_microbatch=16384)  # far more than it samples


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as its configuration has it.

    Attributes:
        skeleton: without storage.
        tokenizer: its tokenizer.
        is_known: it is embedded, and every run can train it.
        said_by: by sampler, why it refuses the model; None if it does not.
    """

    skeleton: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    is_known: bool
    said_by: dict[str, str | None] = field(default_factory=dict)

    def refusal(self, config: RLConfig, device: torch.device) -> str | None:
        """Why a run with these settings would not start; None if it would.

        Args:
            config: of the run, with this model.
            device: where models are used.
        """
        from common.models.attention import check_attention
        from common.models.facts import check_memory
        from common.sampling.checks import check_policy
        from common.sampling.policy_sampler import check_sampler

        try:
            check_sampler(config)
            check_attention(self.skeleton.config, config.attn_implementation)
            check_policy(config, self.skeleton)
            check_memory(self.skeleton, config, device)
        except ValueError as error:
            return str(error)
        return None if self.is_known else self._refusal_of_sampler(config, device)

    def _refusal_of_sampler(self, config: RLConfig, device: torch.device) -> str | None:
        """Asked once of each sampler, since vLLM takes seconds to answer."""
        from common.sampling.checks import check_sampling

        if config.sampler not in self.said_by:
            try:
                check_sampling(config, device)
                self.said_by[config.sampler] = None
            except ValueError as error:
                self.said_by[config.sampler] = str(error)
        return self.said_by[config.sampler]


def read_model(name: str, *, trust_remote_code: bool = False) -> Model:
    """Read what is said of a model outside of its weights.

    Args:
        name: hub id, folder, or the name of an embedded policy.
        trust_remote_code: run Python files that come with it.

    Raises:
        ValueError: there is no such model, or it is of a kind that cannot be trained.
    """
    import transformers

    from common.embedded import check_model, is_embedded, load_tokenizer, skeleton

    check_model(name, trust_remote_code=trust_remote_code)
    model = skeleton(name)
    if not is_embedded(name):
        with suppress(OSError):  # a model need not have one; its end tokens are then those of its configuration
            model.generation_config = transformers.GenerationConfig.from_pretrained(name)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return Model(skeleton=model, tokenizer=tokenizer, is_known=is_embedded(name))


def table(config: RLConfig, model: Model, device: torch.device) -> list[str]:
    """The lines of the table.

    Args:
        config: of the run that the model is for.
        model: what is described.
        device: where models are used.
    """
    rows = {"model": config.model, **_facts(config, model, device)}
    for name, settings in _RUNS.items():
        run = replace(config, **settings, load_in_4bit=config.load_in_4bit and settings["use_lora"])
        reason = model.refusal(run, device)
        rows[name] = "yes" if reason is None else f"no: {textwrap.shorten(reason, _REASON_WIDTH, placeholder=' ...')}"
    return [f"{name:<{_NAME_WIDTH}} {text}" for name, text in rows.items()]


def _facts(config: RLConfig, model: Model, device: torch.device) -> dict[str, str]:
    """The rows about the model and about memory."""
    from common.models.facts import GB, Memory, adapter_parameters, describe_model, memory_there
    from common.models.lora import adapted_modules, describe_left_out, names_in

    skeleton = model.skeleton
    rows = describe_model(skeleton, model.tokenizer, config, device)
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    names = adapted_modules(skeleton, config)
    adapter = adapter_parameters(skeleton, names, config.lora_r)
    left_out = describe_left_out(skeleton, config)
    adapted = f"{adapter:,} parameters at r={config.lora_r} in {len(names)} modules: {names_in(names)}{left_out}"
    rows["LoRA"] = textwrap.shorten(adapted, 2 * _REASON_WIDTH, placeholder=" ...")
    for name, use_lora in (("full", False), ("LoRA", True)):
        run = replace(config, use_lora=use_lora, load_in_4bit=config.load_in_4bit and use_lora)
        rows[f"memory, {name}"] = str(Memory.of(count, adapter, run, device))
    free, total = memory_there(device)
    limit = "" if device.type == "cuda" or host_memory().source == "this machine" else f", of {host_memory().source}"
    rows["memory there"] = f"{free / GB:.3g} GB free of {total / GB:.3g} GB ({device.type}{limit})"
    return rows


# Trying it out


def try_out(config: RLConfig, model: Model) -> bool:
    """Load the model, sample, compare, and print each difference; whether all of them are within their bounds.

    Args:
        config: of the run that is tried out.
        model: as its configuration has it.
    """
    from common.embedded import resolve_model
    from common.sampling.comparison import Comparison

    comparison = Comparison(config, resolve_model(config.model), model.tokenizer)
    bound = _MAX_DIFF[str(comparison.dtype)]
    print(f"\n{comparison.num_completions} completions, twice; {comparison.dtype}, mean difference at most {bound:g}")
    passed = True
    for difference in comparison.run():
        is_right = difference.is_right(bound)
        is_weak = not is_right and difference.is_move and math.isfinite(difference.mean)
        passed &= is_right or is_weak
        word = "PASS" if is_right else "WEAK" if is_weak else "FAIL"
        advice = "" if is_right else f"; {difference.advice}"
        print(f"{word} {difference.what}: {difference.mean:.1e}, largest {difference.largest:.1e}{advice}", flush=True)
    return passed


def main(args: list[str] | None = None) -> None:
    """Print the table and the verdict; with --run, try the model out.

    Args:
        args: command line without the program's name; None: sys.argv.

    Raises:
        ValueError: the model cannot be trained with these settings.
        SystemExit: with status 1 if sampler and trainer differ.
    """
    args = sys.argv[1:] if args is None else args
    if args and not args[0].startswith("-"):
        args = ["--model", *args]
    settings = parse_settings(CheckSettings, args)
    settings.as_run_settings()  # before imports that take seconds
    import torch

    from common.models.chat import why_no_chat
    from common.models.positions import context_length

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = read_model(settings.model, trust_remote_code=settings.trust_remote_code)
    config = settings.as_run_settings(context_length(model.skeleton.config))
    print(*map(printable, table(config, model, device)), sep="\n", flush=True)
    run = f"sampler={config.sampler}, {'LoRA' if config.use_lora else 'full training'}"
    reason = model.refusal(config, device)
    if reason is not None:
        print(f"{'verdict':<{_NAME_WIDTH}} refused with {run}")
        raise ValueError(reason)
    no_chat = model.tokenizer.chat_template is not None and why_no_chat(model.tokenizer) is not None
    if no_chat:
        model.tokenizer.chat_template = None
    if settings.run and not try_out(config, model):
        print(f"{'verdict':<{_NAME_WIDTH}} FAIL with {run}")
        sys.exit(1)
    if no_chat:
        run += ", on prompts of plain text: it cannot use its chat template"
    print(f"{'verdict':<{_NAME_WIDTH}} {'PASS' if settings.run else 'a run starts'} with {run}")


if __name__ == "__main__":
    run_script(main, interrupted="nothing was written")
