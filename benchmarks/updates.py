"""The update against a bare forward and backward of the same micro-batches, in speed and in memory.

The bare loop is a minimal PyTorch loop: logits of every position, log-softmax in float32, no metrics. Its model is as
transformers loads it; its micro-batches are padded and on the device before the clock starts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from benchmarks.timing import comparison, seconds_in_turns
from common.config import RLConfig
from common.embedded import resolve_model
from common.models.loading import compute_dtype, lora_config
from common.models.lora import targets
from common.rollouts import Completion, Rollouts
from common.seeds import hashed_seed
from common.trainer import OnPolicyTrainer
from common.update.batches import forward_context

# The two gradients are summed in different orders, and in bfloat16 they come from different heads.
NORM_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(kw_only=True)
class BareMicrobatch:
    """Rows padded on the right.

    Attributes:
        ids: (b, L) int64.
        targets: (b, L - 1) int64, the next token of each position.
        weights: (b, L - 1) float32, of the log-prob of each target in the loss; 0 outside the completion.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "BareMicrobatch":
        """The same on `device`."""
        return BareMicrobatch(
            ids=self.ids.to(device), targets=self.targets.to(device), weights=self.weights.to(device)
        )


class BareLoop:
    """Only forward, backward and optimizer step.

    Args:
        config: model, precision and temperature are read.
    """

    def __init__(self, config: RLConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.temperature = config.temperature
        self._dtype = compute_dtype(config, self.device)
        folder = resolve_model(config.model)
        dtype = self._dtype if config.use_lora else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        if config.use_lora:
            from peft import get_peft_model

            adapter = lora_config(config, task_type="CAUSAL_LM", target_modules=targets(config, model))
            model = get_peft_model(model, adapter)
        self.model = model.to(self.device).train()
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # The learning rate of the benchmark's settings is 0 too: every update starts from the same weights.
        self.optimizer = AdamW(self._trained, lr=0.0, weight_decay=0.0)

    def update(self, microbatches: list[BareMicrobatch]) -> None:
        """One optimizer step."""
        self.backward(microbatches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, microbatches: list[BareMicrobatch]) -> None:
        """Add up the gradient of all micro-batches."""
        for microbatch in microbatches:
            with forward_context(self.device, self._dtype):
                logits = self.model(input_ids=microbatch.ids, use_cache=False).logits[:, :-1]  # (b, L - 1, V)
                logprobs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
                logprobs = logprobs.gather(2, microbatch.targets[:, :, None]).squeeze(2)
            loss = -(logprobs * microbatch.weights).sum()
            loss.backward()

    def gradient_norm(self, microbatches: list[BareMicrobatch]) -> float:
        """Norm of the gradient; takes no step."""
        self.backward(microbatches)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in self._trained))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def adapt_as(self, policy: nn.Module) -> None:
        """Take over the weights that a policy trains: a new adapter is random."""
        theirs = (parameter for parameter in policy.parameters() if parameter.requires_grad)
        with torch.no_grad():
            for own, other in zip(self._trained, theirs, strict=True):
                own.copy_(other)


def budget_microbatches(trainer: OnPolicyTrainer, rollouts: Rollouts) -> list[BareMicrobatch]:
    """The micro-batches of the trainer's update, in the form of the bare loop."""
    return [
        _bare(part, width=int(part.total_lengths.max()))
        for _, minibatch in _minibatches(trainer, rollouts)
        for _, part in trainer.batches.microbatches(minibatch)
    ]


def fixed_microbatches(trainer: OnPolicyTrainer, rollouts: Rollouts) -> list[BareMicrobatch]:
    """The same rows in their order, a fixed number at a time, all padded to the longest row of the batch.

    That number fits into the token budget if every row has the longest length, as it must with a fixed number. So
    both ways need memory for the same number of padded tokens.
    """
    device, budget = trainer.models.device, trainer.config.max_tokens_per_microbatch
    width = int(rollouts.total_lengths.max())
    num_rows = max(budget // width, 1)
    return [
        _bare(minibatch[start : start + num_rows].to(device), width=width)
        for _, minibatch in _minibatches(trainer, rollouts)
        for start in range(0, len(minibatch), num_rows)
    ]


def sampled_rollouts(trainer: OnPolicyTrainer) -> Rollouts:
    """Completions of the first step's prompts, with random advantages: a policy that never scores has none."""
    config = trainer.config
    prompts = trainer.prompts.batch(1, num_prompts=config.prompts_per_step)
    rollouts = trainer.sample(prompts, num_generations=config.num_generations)
    return _with_advantages(rollouts)


def skewed_rollouts(trainer: OnPolicyTrainer) -> Rollouts:
    """Random tokens of log-normal lengths: most completions short, a few as long as allowed."""
    config = trainer.config
    generator = torch.Generator().manual_seed(hashed_seed(config.seed, "skewed"))
    noise = torch.randn(config.completions_per_step, generator=generator)
    longest = config.max_completion_length
    lengths = (0.17 * longest * (0.9 * noise).exp()).long().clamp(min(5, longest), longest)
    prompts = trainer.prompts.batch(1, num_prompts=config.completions_per_step)
    tokens = [torch.randint(len(trainer.tokenizer), (n,), generator=generator).tolist() for n in lengths.tolist()]
    completions = [Completion(ids, [0.0] * len(ids), False) for ids in tokens]
    rollouts = Rollouts.from_completions(prompts, completions, [""] * len(tokens), num_generations=1)
    rollouts.step_lengths = rollouts.lengths
    return _with_advantages(rollouts)


def compare_update(
    trainer: OnPolicyTrainer, bare: BareLoop, rollouts: Rollouts, *, rounds: int, clock: Callable[[], float]
) -> dict:
    """Real tokens, prompts included, per second of the update and of the bare loop on the same micro-batches.

    Raises:
        AssertionError: if the two do not have the same gradient.
    """
    microbatches = budget_microbatches(trainer, rollouts)
    _check_same_gradient(trainer, bare, rollouts, microbatches)
    ways = {"update": lambda: update(trainer, rollouts), "bare": lambda: bare.update(microbatches)}
    seconds = seconds_in_turns(ways, rounds=rounds, clock=clock)
    result = comparison(seconds, tokens=int(rollouts.total_lengths.sum()), of="update", to="bare")
    return result | {"microbatches": _describe(microbatches)}


def compare_batching(trainer: OnPolicyTrainer, bare: BareLoop, *, rounds: int, clock: Callable[[], float]) -> dict:
    """The same on skewed lengths, by a token budget and by a fixed number of padded rows.

    Returns:
        update: the trainer's update against the bare loop over fixed micro-batches.
        batching: the bare loop over both kinds of micro-batches, so nothing but their shapes differs.
    """
    rollouts = skewed_rollouts(trainer)
    budget, fixed = budget_microbatches(trainer, rollouts), fixed_microbatches(trainer, rollouts)
    _check_same_gradient(trainer, bare, rollouts, fixed)
    ways = {
        "update": lambda: update(trainer, rollouts),
        "token budget": lambda: bare.update(budget),
        "fixed rows": lambda: bare.update(fixed),
    }
    seconds = seconds_in_turns(ways, rounds=rounds, clock=clock)
    tokens = int(rollouts.total_lengths.sum())
    return {
        "update": comparison(seconds, tokens=tokens, of="update", to="fixed rows"),
        "batching": comparison(seconds, tokens=tokens, of="token budget", to="fixed rows"),
        "completion_length": {
            "median": median(rollouts.lengths.tolist()),
            "mean": float(rollouts.lengths.float().mean()),
            "longest": int(rollouts.lengths.max()),
        },
        "microbatches": {"token budget": _describe(budget), "fixed rows": _describe(fixed)},
    }


def update(trainer: OnPolicyTrainer, rollouts: Rollouts) -> None:
    """The trainer's update. With the settings' learning rate of 0 it does all of its work but changes no weight."""
    trainer.update(trainer.policy, rollouts, trainer.loss, average_over=trainer.config.average_over)


def _check_same_gradient(
    trainer: OnPolicyTrainer, bare: BareLoop, rollouts: Rollouts, microbatches: list[BareMicrobatch]
) -> None:
    with trainer.models.use("policy") as policy:
        bare.adapt_as(policy)
    trainer.metrics.reduce(trainer.accelerator)
    update(trainer, rollouts)
    norm, expected = trainer.metrics.reduce(trainer.accelerator)["policy/grad_norm"], bare.gradient_norm(microbatches)
    difference = abs(norm - expected) / expected
    assert difference < NORM_TOLERANCE[trainer.dtype], f"gradient norms differ: update {norm}, bare loop {expected}"


def _minibatches(trainer: OnPolicyTrainer, rollouts: Rollouts) -> Iterator[tuple[Tensor, Rollouts]]:
    return trainer.batches.minibatches(
        rollouts, step=trainer.current_step, epoch=0, average_over=trainer.config.average_over
    )


def _bare(rollouts: Rollouts, *, width: int) -> BareMicrobatch:
    """Rows in the form of the bare loop, padded to `width` tokens."""
    sequence_ids, prompt_lengths = rollouts.sequences()
    ids = torch.nn.functional.pad(sequence_ids, (0, width - sequence_ids.shape[1]))  # (b, L)
    positions = torch.arange(width - 1, device=ids.device)[None, :] + 1  # of the targets
    chosen = (positions >= prompt_lengths[:, None]) & (positions < rollouts.total_lengths[:, None])  # (b, L - 1)
    weights = torch.zeros(chosen.shape, device=ids.device)
    mask = rollouts.completion_mask
    weights = weights.masked_scatter(chosen, (rollouts.advantages * rollouts.token_weights)[mask])
    return BareMicrobatch(ids=ids, targets=ids[:, 1:], weights=weights)


def _with_advantages(rollouts: Rollouts) -> Rollouts:
    generator = torch.Generator().manual_seed(0)
    rollouts.advantages = rollouts.spread(torch.randn(len(rollouts), generator=generator))
    return rollouts


def _describe(microbatches: list[BareMicrobatch]) -> dict[str, int]:
    sizes = [microbatch.ids.numel() for microbatch in microbatches]
    return {"number": len(sizes), "padded_tokens": sum(sizes), "largest": max(sizes)}
