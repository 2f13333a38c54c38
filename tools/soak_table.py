"""What tools/soak.py found: each event's outcome, and the table of all."""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.soak_plan import KINDS, Event

HEADINGS = (
    *("event", "sampler", "algorithm", "processes", "how many", "survived", "equal", "failed"),
    *("steps lost at most", "slowest resume"),
)
# What an event may come to. Of "said so", the run's files or its messages name what is not as in an uninterrupted run.
PASSED = ("equal", "said so")
NOT_TRIED = ("missed", "skipped")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an event came to.

    Attributes:
        event: what happened.
        verdict: one of PASSED and NOT_TRIED, or "failed".
        reason: why it is not "equal".
        survived: the run could be continued to its end, or said that it could not where nobody could.
        equal: it then was the run that nothing interrupts.
        steps_lost: finished steps that an interruption has cost.
        resume_seconds: from the command that continued the run to its end; 0 if none did.
        seconds: of the whole case.
    """

    event: Event
    verdict: str
    reason: str = ""
    survived: bool = False
    equal: bool = False
    steps_lost: int = 0
    resume_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tried(self) -> bool:
        return self.verdict not in NOT_TRIED


def table(outcomes: Sequence[Outcome]) -> str:
    """Rows of the table in Markdown, one for each kind of event, sampler, algorithm and number of processes."""
    groups: dict[tuple, list[Outcome]] = {}
    for outcome in outcomes:
        event = outcome.event
        key = (KINDS.index(event.kind), event.setup.sampler, event.setup.algorithm, event.setup.processes)
        groups.setdefault(key, []).append(outcome)
    rows = [_row((KINDS[key[0]], *key[1:]), groups[key]) for key in sorted(groups)]
    rows.append(_row(("all", "", "", ""), outcomes))
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEADINGS, ("---",) * len(HEADINGS), *rows))


def _row(key: tuple, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    tried = [outcome for outcome in outcomes if outcome.tried]
    equal = sum(outcome.equal for outcome in tried)
    lost = max((outcome.steps_lost for outcome in tried), default=0)
    slowest = max((outcome.resume_seconds for outcome in tried), default=0.0)
    failed = sum(outcome.verdict == "failed" for outcome in tried)
    numbers = (len(tried), sum(outcome.survived for outcome in tried), equal, failed, lost)
    return (*map(str, key), *map(str, numbers), f"{slowest:.1f} s" if slowest else "")


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    """What the table leaves out, in lines."""
    count = dict.fromkeys((*PASSED, *NOT_TRIED, "failed"), 0)
    for outcome in outcomes:
        count[outcome.verdict] += 1
    tried = sum(outcome.tried for outcome in outcomes)
    numbers = ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
    lines = [f"{tried} events in {seconds / 60:.1f} minutes: {numbers or 'none'}"]
    reasons: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.verdict in (*NOT_TRIED, "said so"):
            text = f"{outcome.event.kind}, {outcome.verdict}: {outcome.reason}"
            reasons[text] = reasons.get(text, 0) + 1
    return "\n".join([*lines, *(f"  {number} x {text}" for text, number in reasons.items())])
