"""What tools/soak.py does to which run, and when: drawn from a seed, so that the same seed gives the same plan.

Event N depends on the seed, on N and on what may be drawn, and on nothing that happened before: any event can be
repeated alone.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tools.soak_runs import ALGORITHMS, NUM_STEPS, Setup

KILLS = ("kill", "kill-group", "kill-writing", "kill-starting", "kill-often")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "second-signal")
WRITING = ("full-disk", "file-limit", "read-only")
DAMAGES = ("metrics-cut", "metrics-emptied", "samples-cut", "checkpoint-cut", "checkpoint-bit", "checkpoint-file")
DELETIONS = ("config-deleted", "folder-deleted")
WORKERS = ("keeper-killed", "worker-killed")
LOSSES = ("one-killed", "one-stopped")  # of two processes, which a launcher starts again
KINDS = (*KILLS, *SIGNALS, *WRITING, *DAMAGES, *DELETIONS, *WORKERS, *LOSSES)

# One start of vLLM takes as long as two of transformers, and two processes as long as two.
EVERY_VLLM, EVERY_TWO = 6, 5
AIMS = ("checkpoint-", "final", "")  # temporary names begin so
GRACES = (0, 30)  # seconds; with 0 the step in hand is left, which the default would finish


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When something happens to a run.

    Attributes:
        step: after this step's line in metrics.jsonl; -1: counted from the start of the command.
        fraction: how much later, from 0 to 1; what 1 means depends on what is waited for.
        aim: None, or the beginning of a file's name: the moment is when such a file is being written.
    """

    step: int
    fraction: float
    aim: str | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """One case.

    Attributes:
        number: its place in the plan.
        kind: one of KINDS.
        setup: what is run.
        save_every: steps from one checkpoint to the next.
        moments: when it happens; one for each time that the run is interrupted.
        group: whether a signal goes to the whole process group.
        level: 0 to 1; how full a disk is, where a file is cut, which of several processes is meant.
        choice: 0 to 1; what `level` leaves open.
        grace: the run's stop_grace.
    """

    number: int
    kind: str
    setup: Setup
    save_every: int
    moments: tuple[Moment, ...]
    group: bool
    level: float
    choice: float
    grace: int


def event(
    seed: int,
    number: int,
    *,
    kinds: Sequence[str] = KINDS,
    samplers: Sequence[str] = ("transformers", "vllm"),
    processes: Sequence[int] = (1, 2),
    algorithms: Sequence[str] = ALGORITHMS,
) -> Event:
    """Event `number` of a plan.

    Args:
        seed: of the plan.
        number: from 0.
        kinds: those that may be drawn; each comes once before one comes again.
        samplers: vLLM comes every sixth time if there is a choice.
        processes: numbers of processes; two come every fifth time if there is a choice.
        algorithms: in rotation.
    """
    turn, place = divmod(number, len(kinds))
    kind = random.Random(f"order {seed} {turn}").sample(kinds, len(kinds))[place]
    draw = random.Random(f"event {seed} {number}")
    # Beginning somewhere else in each turn, or a kind would always meet the same setups.
    count = number + turn
    setup = Setup(
        algorithm=random.Random(f"algorithms {seed}").sample(algorithms, len(algorithms))[count % len(algorithms)],
        sampler=_seldom(samplers, "vllm", count % EVERY_VLLM == EVERY_VLLM - 1),
        processes=_seldom(processes, 2, count % EVERY_TWO == EVERY_TWO - 1 or kind in LOSSES),
    )
    return Event(
        number=number,
        kind=kind,
        setup=setup,
        # With one checkpoint after each step, there is another one when the last is damaged. With few, it shows
        # whether a signal has one written.
        save_every=1 if kind.startswith("checkpoint-") else draw.randint(1, 3) + (kind in SIGNALS),
        moments=_moments(kind, draw),
        group=draw.random() < 0.5,
        level=draw.random(),
        choice=draw.random(),
        grace=draw.choice(GRACES),
    )


def _seldom(values: Sequence, rare: str | int, its_turn: bool) -> str | int:
    """The rare value if there is one and it is its turn, or there is no other."""
    common = [value for value in values if value != rare]
    return rare if rare in values and (its_turn or not common) else common[0]


def _moments(kind: str, draw: random.Random) -> tuple[Moment, ...]:
    if kind == "kill-starting":  # once in its imports, once in what it prepares, once in its steps
        return (
            *(Moment(step=-1, fraction=draw.random()) for _ in range(2)),
            Moment(step=draw.randint(1, NUM_STEPS - 1), fraction=draw.random()),
        )
    if kind == "kill-often":
        steps = sorted(draw.sample(range(NUM_STEPS), 3))
        return tuple(Moment(step=step, fraction=draw.random()) for step in steps)
    if kind == "kill-writing":
        aim = draw.choice(AIMS)
        first = NUM_STEPS - 1 if aim == "final" else draw.randint(0, NUM_STEPS - 3)
        return (Moment(step=first, fraction=draw.random(), aim=aim),)
    if kind in SIGNALS and draw.random() < 0.2:  # during its imports too
        return (Moment(step=-1, fraction=draw.random()),)
    if kind in SIGNALS and kind != "second-signal" and draw.random() < 0.3:  # while it writes a checkpoint, or final/
        aim = draw.choice(AIMS)
        first = NUM_STEPS - 1 if aim == "final" else draw.randint(0, NUM_STEPS - 4)
        return (Moment(step=first, fraction=draw.random(), aim=aim),)
    lowest = 3 if kind in DAMAGES else 0  # with two checkpoints at least, where it is one of them
    return (Moment(step=draw.randint(lowest, NUM_STEPS - 3), fraction=draw.random()),)
