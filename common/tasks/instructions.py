"""Instructions: write a few sentences about a topic and follow one instruction that a program can check.

The instructions are in the style of IFEval (huggingface.co/papers/2311.07911): capital letters, quotation marks, a
number of sentences, a given end. Prompts are generated from topics; those held out are about other topics. Two rules
score a completion. `on_topic` is what keeps it a text: an instruction followed by nonsense earns nothing.
"""

import re
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import transformers

from common.config import RLConfig
from common.data.rows import SPLIT_SEED, read_rows
from common.rewards.rules import rule
from common.tasks import Task

_TOPICS = """\
apples, autumn, baking bread, bees, bicycles, birds, boats, books, bridges, butterflies, camping, candles, cats,
cheese, chess, children, chocolate, cities, clocks, clouds, coffee, cooking, courage, cows, dancing, deserts, dogs,
dolphins, dreams, drums, elephants, exercise, families, farms, fire, fishing, flowers, flying, football, forests,
friends, frogs, gardens, glass, gold, grandparents, guitars, hats, hiking, history, holidays, honesty, honey, horses,
hospitals, houses, ice, insects, islands, jokes, juice, kindness, kites, lakes, languages, laughter, lemons, letters,
libraries, lions, luck, maps, markets, mathematics, medicine, memory, milk, mirrors, money, monkeys, moonlight,
mornings, mountains, movies, museums, music, neighbors, newspapers, night, oceans, onions, oranges, owls, painting,
paper, parents, parks, patience, penguins, photos, pianos, pizza, planets, plants, poems, potatoes, rabbits, radios,
rain, reading, rice, rivers, roads, robots, running, sailing, salt, schools, science, seasons, shadows, sheep, shoes,
silence, singing, sleep, snow, soap, soup, spiders, spring, stars, stories, storms, strangers, students, sugar,
summer, sunlight, swimming, teachers, tea, telephones, tennis, tigers, time, tomatoes, towns, toys, trains, travel,
trees, trust, turtles, umbrellas, vegetables, villages, volcanoes, walking, water, weather, whales, wheels, wind,
windows, winter, wisdom, wolves, wood, work"""
TOPICS = tuple(_TOPICS.replace("\n", " ").split(", "))

USER_TEXT = "Write one or two sentences about {topic}. {instruction}"

MIN_WORDS = 5
MAX_REPEATED = 0.5  # of a text's words: with so many, it says the same again and again

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_CLOSING = r"[\"'\u201d\u2019)*]*"
_SENTENCE_END = re.compile(rf"[.!?]+{_CLOSING}(?=\s|$)")
_LAST = re.compile(rf"[.!?]{_CLOSING}$")
_QUOTES = '"\u201c\u201d'


class Instruction(NamedTuple):
    """A kind of instruction.

    Attributes:
        text: what it asks for; ``{value}`` stands for one of `values`.
        follows: whether a text, without white space around it, does what is asked for with a value.
        values: the values.
    """

    text: str
    follows: Callable[[str, str], bool]
    values: tuple[str, ...] = ("",)


def words(text: str) -> list[str]:
    """The words of a text in small letters."""
    return [word.lower() for word in _WORD.findall(text)]


def num_sentences(text: str) -> int:
    """How many times a text has the end of a sentence, and one more for what follows the last."""
    ends = list(_SENTENCE_END.finditer(text))
    return len(ends) + bool(text[ends[-1].end() if ends else 0 :].strip())


def _points(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("- ") and words(line)]


def _sentences(text: str, value: str) -> bool:
    return num_sentences(text) == (1 if value == "one sentence" else 2)


def _bullets(text: str, value: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) == len(_points(text)) == int(value)


def _title(text: str, value: str) -> bool:
    title = re.match(r"<<([^<>\n]+)>>(.+)", text, re.DOTALL)
    return title is not None and bool(words(title[1])) and bool(words(title[2]))


def _postscript(text: str, value: str) -> bool:
    before, mark, after = text.partition("P.S.")
    return bool(mark and words(before) and words(after))


INSTRUCTIONS = {
    "small_letters": Instruction("Use small letters only, no capital letters.", lambda text, _: text == text.lower()),
    "capitals": Instruction("Use capital letters only.", lambda text, _: text == text.upper()),
    "quotes": Instruction(
        "Put the whole text in double quotation marks.",
        lambda text, _: text[0] in _QUOTES and text[-1] in _QUOTES and not set(_QUOTES) & set(text[1:-1]),
    ),
    "no_commas": Instruction("Do not use any commas.", lambda text, _: "," not in text),
    "no_word": Instruction(
        'Do not use the word "{value}".', lambda text, value: value not in words(text), ("the", "and", "of")
    ),
    "sentences": Instruction("Write exactly {value}.", _sentences, ("one sentence", "two sentences")),
    "at_most": Instruction(
        "Use at most {value} words.", lambda text, value: len(words(text)) <= int(value), ("10", "15")
    ),
    "begin": Instruction(
        'Begin with the word "{value}".',
        lambda text, value: words(text)[0] == value.lower(),
        ("Today", "Sometimes", "Maybe"),
    ),
    "end": Instruction(
        'End with the sentence "{value}"',
        lambda text, value: text.endswith(value),
        ("That is all.", "Who knows?", "I love it!"),
    ),
    "question": Instruction("End with a question.", lambda text, _: text.endswith("?")),
    "bullets": Instruction(
        'Write only {value} bullet points, each on a line that begins with "- ".', _bullets, ("2", "3")
    ),
    "title": Instruction("Begin with a title in double angle brackets, such as <<My Title>>.", _title),
    "postscript": Instruction('At the end add a postscript that begins with "P.S."', _postscript),
}


def load(config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> Task:
    """Give prompts, held-out prompts about other topics, and the two rewards.

    Args:
        config: `dataset` (None for the topics that come with the task, or a source with a column `topic`),
            `dataset_split` and `num_eval_prompts` are read.
        tokenizer: with a chat template, prompts are chat messages, else plain text.

    Raises:
        ValueError: the data cannot be read, or `num_eval_prompts` leaves no topic to train on.
    """
    topics = list(TOPICS) if config.dataset is None else read_topics(config.dataset, config.dataset_split)
    train, held_out = split_topics(topics, config.num_eval_prompts)
    write_prompt = _plain_prompt if tokenizer.chat_template is None else _chat_prompt
    return Task(
        train=[{"prompt": write_prompt(row), **row} for row in train],
        eval=[{"prompt": write_prompt(row), **row} for row in held_out],
        rewards={"followed": followed_reward, "on_topic": on_topic_reward},
        reward_weights={"followed": 1.0, "on_topic": 0.2},
        accuracy="followed",
        format="on_topic",
    )


def read_topics(source: str, split: str) -> list[str]:
    """Read distinct topics.

    Raises:
        ValueError: the source cannot be read or has no column `topic`, or a topic is no text with a word in it.
    """
    topics = []
    for number, row in enumerate(read_rows(source, split, ["topic"]), start=1):
        topic = row["topic"]
        if not (isinstance(topic, str) and words(topic)):
            raise ValueError(
                f"dataset={source}: row {number} has topic={topic!r:.80}. Need a text to put into "
                f'"{USER_TEXT.split("{")[0]}...", such as "birds". Correct or remove the row.'
            )
        topics.append(topic.strip())
    return list(dict.fromkeys(topics))


def split_topics(topics: list[str], num_eval_prompts: int) -> tuple[list[dict], list[dict]]:
    """Every topic with every instruction, as rows; held out are rows of the fewest topics that are enough.

    Args:
        topics: distinct.
        num_eval_prompts: number of rows to hold out.

    Returns:
        Rows to train on and held-out rows: {"topic", "instruction": its name, "value"}.

    Raises:
        ValueError: no topic would be left to train on.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    topics = [topics[index] for index in rng.permutation(len(topics))]
    num_held_out = -(-num_eval_prompts // len(INSTRUCTIONS))
    if num_held_out >= len(topics):
        raise ValueError(
            f"num_eval_prompts={num_eval_prompts}: held-out prompts are about topics of their own, {num_held_out} of "
            f"them, and there are {len(topics)}. Pass a smaller --num_eval_prompts, or more topics with --dataset."
        )
    # A topic has each instruction once, with one of its values.
    rows = [
        {"topic": topic, "instruction": name, "value": str(rng.choice(instruction.values))}
        for topic, (name, instruction) in product(topics, INSTRUCTIONS.items())
    ]
    boundary = num_held_out * len(INSTRUCTIONS)
    held_out = [rows[index] for index in rng.permutation(boundary)[:num_eval_prompts]]
    return rows[boundary:], held_out


def _plain_prompt(row: dict) -> str:
    asked = INSTRUCTIONS[row["instruction"]].text.format(value=row["value"])
    return USER_TEXT.format(topic=row["topic"], instruction=asked)


def _chat_prompt(row: dict) -> list[dict[str, str]]:
    return [{"role": "user", "content": _plain_prompt(row)}]


# Rewards


@rule
def followed_reward(
    prompts: list[str],
    completions: list[str],
    *,
    topic: list[str],
    instruction: list[str],
    value: list[str],
    **columns: list,
) -> list[float]:
    """1.0 for a text on the topic (see `on_topic_reward`) that follows its instruction, else 0.

    Args:
        prompts: B prompts.
        completions: B completions.
        topic: B topics.
        instruction: B names of instructions, keys of `INSTRUCTIONS`.
        value: B values of the instructions; empty for those that have none.
        columns: not used.

    Returns:
        B rewards.
    """
    rows = zip((text.strip() for text in completions), topic, instruction, value, strict=True)
    return [
        float(is_on_topic(text, about) and INSTRUCTIONS[name].follows(text, with_value))
        for text, about, name, with_value in rows
    ]


@rule
def on_topic_reward(prompts: list[str], completions: list[str], *, topic: list[str], **columns: list) -> list[float]:
    """1.0 for a finished text on the topic, else 0; whether the instruction is followed does not matter.

    Args:
        prompts: B prompts.
        completions: B completions.
        topic: B topics.
        columns: not used.

    Returns:
        B rewards.
    """
    return [float(is_on_topic(text.strip(), about)) for text, about in zip(completions, topic, strict=True)]


def is_on_topic(text: str, topic: str) -> bool:
    """Whether a text of five words or more names the topic, has an end, and does not repeat itself.

    The topic is named by any of its words of four letters or more (or any word, if all are shorter), in the singular
    too. The end is that of a sentence: a text that ran out of tokens has none.

    Args:
        text: without white space around it.
        topic: as in the prompt.
    """
    said = words(text)
    if len(said) < MIN_WORDS or not _LAST.search(text):
        return False
    if len(set(said)) <= (1 - MAX_REPEATED) * len(said):
        return False
    about = words(topic)
    stems = {_stem(word) for word in about if len(word) > 3} or {_stem(word) for word in about}
    return any(word.startswith(stem) for word in said for stem in stems)


def _stem(word: str) -> str:
    """What singular and plural share: butterfl for butterflies, wol for wolves, bak for baking, sheep for sheep."""
    for ending in ("ies", "ves", "ing", "oes", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending) + ("o" if ending == "oes" else "")
    return word
