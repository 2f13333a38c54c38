"""Made-up school problems as long as those of GSM8K: `question`, and an `answer` that ends in "#### 42".

A question has 45 words on average, as in GSM8K; four of five have 21 to 71 (GSM8K: 27 to 69).
"""

import json
import random
from pathlib import Path

NAMES = ("Natalia", "Weng", "Betty", "Julie", "James", "Mark", "Albert", "Ken", "Alexis", "Tina")
PLACES = ("the market", "her grandmother's farm", "the school fair", "a shop in town", "the library", "summer camp")
THINGS = ("apples", "notebooks", "glass marbles", "picture cards", "eggs", "pencils", "wooden toys", "cookies")
EVENTS = (
    ("On {day} a friend brings {n} more of them in a large box.", 1),
    ("Then {n} get lost on the way to {place}.", -1),
    ("At {place} there are another {n} for free, and all of these go into the bag as well.", 1),
    ("A week later {n} are given away to the neighbours, who asked for some.", -1),
    ("For a birthday there are {n} new ones.", 1),
    ("In the evening {n} turn out to be broken and have to be thrown away.", -1),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def write_problems(file: Path, count: int, *, seed: int = 0) -> None:
    """Write problems as JSON lines, a function of the seed.

    Args:
        file: of that name.
        count: problems.
        seed: of the random numbers.
    """
    rng = random.Random(seed)
    file.write_text("".join(json.dumps(problem(rng)) + "\n" for _ in range(count)), encoding="utf-8")


def problem(rng: random.Random) -> dict[str, str]:
    """One problem; nothing becomes negative."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    amount = rng.randint(20, 60)
    story, lines = [f"{name} starts the week with {amount} {things} from {rng.choice(PLACES)}."], []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4))):
        text, sign = rng.choice([event for event in EVENTS if event[1] > 0 or amount > 9])
        change = rng.randint(2, 9)
        story.append(text.format(n=change, day=rng.choice(DAYS), place=rng.choice(PLACES)))
        result = amount + sign * change
        lines.append(f"{amount} {'+' if sign > 0 else '-'} {change} = {result}")
        amount = result
    question = " ".join([*story, f"How many {things} does {name} have at the end?"])
    return {"question": question, "answer": "\n".join([*lines, f"#### {amount}"])}
