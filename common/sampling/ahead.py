"""Completions of each step that are sampled while the step before it trains: sampling_lag=1.

At its beginning a step takes what waits for it, and asks for the completions of the next step: whole, under the
weights that the policy has then, with the same seeds as ever. They are there before its end. So step k trains on what
the policy of one step earlier has drawn, whenever the sampler draws it; only the time of a step depends on that. What
waits is part of every checkpoint, since the weights that it comes from are gone by then.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from common.rollouts import Completion, PromptBatch, Rollouts
from common.sampling.policy_sampler import PolicySampler

logger = logging.getLogger("nanorlhf")

# What waits for a step on all processes, as tensors and numbers: see `packed`.
Waiting = dict[str, Any]


@dataclass(frozen=True)
class _Asked:
    """Completions of a step's prompts that are drawn, or will be."""

    prompts: PromptBatch
    num_generations: int
    completions: Future[list[Completion]]


class Ahead:
    """Gives a step the completions that wait for it, and asks for those of the next one.

    Args:
        policy_sampler: draws them.
        prompts_of: this process's prompts of a step.
        num_steps: of the run; nothing is drawn for a step after the last one.
        gather: what each process passes, as a list by process; on all of them.
        waiting: what a checkpoint has kept for the next step, of all processes; None: nothing.

    Attributes:
        is_lagged: the completions of the step in hand are of the policy of one step earlier; False in the first step,
            for which nothing has waited.
    """

    def __init__(
        self,
        policy_sampler: PolicySampler,
        prompts_of: Callable[[int], PromptBatch],
        *,
        num_steps: int,
        gather: Callable[[object], list],
        waiting: Waiting | None = None,
    ) -> None:
        self._sampler, self._prompts_of = policy_sampler, prompts_of
        self._num_steps, self._gather = num_steps, gather
        self._asked: _Asked | None = None
        self.is_lagged = False
        if waiting is not None:
            prompts, kept = prompts_of(waiting["step"]), Future()
            kept.set_result(unpacked(waiting, prompts.rows))
            self._asked = _Asked(prompts, waiting["num_generations"], kept)

    def sample(self, prompts: PromptBatch, *, num_generations: int) -> Rollouts:
        """The completions of a step, from the policy of one step earlier; those of the next one are asked for.

        Where nothing waits, which is so in a run's first step, the policy draws them now.

        Args:
            prompts: this process's prompts of the step, as `prompts_of` gives them.
            num_generations: completions per prompt, G, the same in every step.

        Returns:
            B = len(prompts) x G rows, those of one prompt adjacent.

        Raises:
            ValueError: the request is another one than that of the step before, or the second one of a step.
        """
        asked, step = self._asked, prompts.step
        self.is_lagged = asked is not None
        if asked is None:
            if step > 1:
                logger.info(
                    "step %d: sampling_lag=1, and no completions wait for it, since the run was to end before: its "
                    "own are sampled first, from the policy of step %d",
                    *(step, step - 1),
                )
            asked = self._ask(step, num_generations)
            with self._sampler.stopwatch("sample"):
                asked.completions.result()  # before the next request, whose noise it does not share
        self._check(asked, prompts, num_generations)
        self._asked = self._ask(step + 1, num_generations) if step < self._num_steps else None
        return self._sampler.rollouts(prompts, asked.completions.result(), num_generations=num_generations)

    def _ask(self, step: int, num_generations: int) -> _Asked:
        prompts = self._prompts_of(step)
        completions = self._sampler.begin(prompts, num_generations=num_generations, purpose="train")
        return _Asked(prompts, num_generations, completions)

    @staticmethod
    def _check(asked: _Asked, prompts: PromptBatch, num_generations: int) -> None:
        expected = asked.prompts
        same = expected.step == prompts.step and expected.prompt_ids == prompts.prompt_ids
        if same and expected.rows == prompts.rows and asked.num_generations == num_generations:
            return
        raise ValueError(
            f"step {prompts.step} asks for {num_generations} completions of each of {len(prompts)} prompts; with "
            f"sampling_lag=1, {asked.num_generations} of each of the {len(expected)} prompts of step {expected.step} "
            "were sampled before. A step must call sample once with its own prompts as they come, and with the same "
            "num_generations in every step; other completions need another purpose. Pass --sampling_lag 0, or change "
            "the algorithm's step."
        )

    def finish(self) -> Waiting | None:
        """Wait until the completions of the next step are there; all processes must call it.

        Returns:
            What a checkpoint of this step keeps, of all processes; None if nothing waits.

        Raises:
            Exception: what the sampler has raised, or on the other processes a RuntimeError that says it.
        """
        asked, failed, own = self._asked, None, None
        if asked is None:
            return None
        try:
            own = packed(asked.prompts, asked.completions.result(), asked.num_generations)
        except Exception as error:
            failed = error
        parts = self._gather((own, failed and f"{type(failed).__name__}: {failed}"))
        if failed is not None:
            raise failed
        for process, (_, error) in enumerate(parts):
            if error is not None:
                raise RuntimeError(f"sampling for step {asked.prompts.step} failed in process {process}: {error}")
        return joined([part for part, _ in parts])


def packed(prompts: PromptBatch, completions: list[Completion], num_generations: int) -> Waiting:
    """Completions as a checkpoint keeps them.

    Args:
        prompts: of a step.
        completions: len(prompts) x G, those of one prompt adjacent.
        num_generations: G.

    Returns:
        step and num_generations; rows: (prompts,) int64, ascending; lengths: (B,) int64; truncated: (B,) bool; and
        token_ids, int32, and logprobs, float32 as in Rollouts, of all completions one after the other.
    """
    return {
        "step": prompts.step,
        "num_generations": num_generations,
        "rows": torch.tensor(prompts.rows, dtype=torch.int64),
        "lengths": torch.tensor([len(each.token_ids) for each in completions], dtype=torch.int64),
        "truncated": torch.tensor([each.truncated for each in completions], dtype=torch.bool),
        "token_ids": torch.tensor([id for each in completions for id in each.token_ids], dtype=torch.int32),
        "logprobs": torch.tensor([value for each in completions for value in each.logprobs], dtype=torch.float32),
    }


def joined(parts: list[Waiting]) -> Waiting:
    """What `packed` gave on each process, as one; rows of the first process come first."""
    same = {name: parts[0][name] for name in ("step", "num_generations")}
    return same | {name: torch.cat([part[name] for part in parts]) for name in parts[0].keys() - same.keys()}


def unpacked(waiting: Waiting, rows: list[int]) -> list[Completion]:
    """The completions of some prompts, however many processes have drawn them.

    Args:
        waiting: of all processes.
        rows: of the prompts in their step; each is there.

    Returns:
        len(rows) x G completions, those of one prompt adjacent.
    """
    lengths, size = waiting["lengths"].tolist(), waiting["num_generations"]
    ids, logprobs = waiting["token_ids"].tolist(), waiting["logprobs"].tolist()
    starts = list(accumulate(lengths, initial=0))
    place = {row: i for i, row in enumerate(waiting["rows"].tolist())}
    chosen = [place[row] * size + g for row in rows for g in range(size)]
    truncated = waiting["truncated"].tolist()
    return [
        Completion(ids[starts[i] : starts[i + 1]], logprobs[starts[i] : starts[i + 1]], truncated[i]) for i in chosen
    ]
