"""The task instructions: which texts are on the topic, which follow their instruction, and what is held out."""

import json

import pytest

from common.config import RLConfig
from common.embedded.policy import build_tokenizer
from common.rewards.rules import is_rule
from common.tasks import load_task
from common.tasks.instructions import (
    INSTRUCTIONS,
    TOPICS,
    USER_TEXT,
    followed_reward,
    is_on_topic,
    num_sentences,
    on_topic_reward,
    split_topics,
)

# For each instruction a value, texts about bees that follow it, and texts about bees that do not.
CASES = [
    ("small_letters", "", ["bees are small and busy."], ["Bees are small and busy."]),
    ("capitals", "", ["BEES MAKE HONEY, AND WE EAT IT."], ["BEES MAKE Honey, AND WE EAT IT."]),
    (
        "quotes",
        "",
        ['"Bees are small and busy."', "\u201cBees are small and busy.\u201d"],
        ['Bees are "small and busy."', '"Bees are small." They are "busy."', '"Bees" are small and busy.'],
    ),
    ("no_commas", "", ["Bees are small and busy."], ["Bees are small, and they are busy."]),
    ("no_word", "the", ["Bees make honey in these hives."], ["In The hive bees make honey."]),
    (
        "sentences",
        "two sentences",
        ["Bees are small. They make honey!", "Bees are small (and busy.) Do they sleep?"],
        ["Bees are small and make honey.", "Bees are small. They make honey. We eat it."],
    ),
    ("sentences", "one sentence", ["Bees weigh 0.1 grams or so."], ["Bees are small. They make honey."]),
    ("at_most", "10", ["Bees are small and busy."], ["Bees are small and busy, and they make honey in a hive."]),
    ("begin", "Today", ["Today bees are very busy.", "today the bees sleep late!"], ["Bees are busy here today."]),
    ("end", "Who knows?", ["Are bees happy here? Who knows?"], ["Who knows? Bees are happy here."]),
    ("question", "", ["Do bees ever sleep at night?"], ["Do bees sleep? They surely do."]),
    (
        "bullets",
        "2",
        ["- Bees are small.\n- Bees are busy.", "- Bees are small.\n\n- They are busy."],
        [
            "Bees are:\n- small\n- and very busy.",
            "- Bees are small and very busy.",
            "* Bees are small.\n* Bees are busy.",
        ],
    ),
    ("title", "", ["<<Busy Bees>> Bees are small."], ["<Busy Bees> Bees are small.", "<<>> Bees are small and busy."]),
    (
        "postscript",
        "",
        ["Bees are busy. P.S. I love honey."],
        ["P.S. Bees are small and busy.", "Bees are busy. P.S."],
    ),
]


def followed(text: str, name: str, value: str, topic: str = "bees") -> float:
    return followed_reward(["?"], [text], topic=[topic], instruction=[name], value=[value])[0]


@pytest.mark.parametrize(("name", "value", "good", "bad"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_a_text_follows_its_instruction(name, value, good, bad):
    assert [followed(f" {text}\n", name, value) for text in good] == [1.0] * len(good)
    assert [followed(text, name, value) for text in bad] == [0.0] * len(bad)


def test_every_instruction_has_a_case():
    assert {case[0] for case in CASES} == set(INSTRUCTIONS)
    assert all(case[1] in INSTRUCTIONS[case[0]].values for case in CASES)


@pytest.mark.parametrize(
    ("text", "topic"),
    [
        ("A bee is a small animal.", "bees"),
        ("The wolf hunts in a pack at night!", "wolves"),
        ("One potato is never enough for me.", "potatoes"),
        ('"I bake every day, and so do you."', "baking bread"),
        ("Sheep eat grass on every hill.", "sheep"),
        ("Gold is a metal that shines \u2013 so they say.", "gold"),
        ("Tea is a warm drink for cold days", "tea"),
    ],
)
def test_a_text_on_its_topic(text, topic):
    assert is_on_topic(text, topic) == (text[-1] != "s")  # the last one has no end


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "Bees are small.",  # too short to be a text
        "Wasps are small and quick animals.",
        "Bees are small animals that live in hives and make",
        "Bees bees bees bees bees bees.",
        "Bees are small. Bees are small.",
        "beesbeesbeesbeesbeesbees!",
    ],
)
def test_no_text_on_its_topic(text):
    assert not is_on_topic(text, "bees")
    assert on_topic_reward(["?"], [text], topic=["bees"]) == [0.0]
    assert all(followed(text, name, instruction.values[0]) == 0 for name, instruction in INSTRUCTIONS.items())


def test_hostile_texts_take_no_time_and_raise_nothing():
    for text in (
        "<<" * 50_000,
        '"' * 100_000,
        ".!?" * 50_000,
        "- \n" * 50_000,
        "bees " * 20_000 + ".",
        "P.S." * 20_000,
    ):
        for name, instruction in INSTRUCTIONS.items():
            followed(text, name, instruction.values[0])


def test_sentences_are_counted():
    counts = [
        num_sentences(text) for text in ("", "No end", "One.", "One. Two", 'He said "no." I left!', "3.5 metres.")
    ]
    assert counts == [0, 1, 1, 2, 2, 1]


def test_rewards_run_in_the_worker():
    assert is_rule(followed_reward)
    assert is_rule(on_topic_reward)


# The data


def test_held_out_prompts_are_about_topics_of_their_own():
    train, held_out = split_topics(list(TOPICS), 256)
    assert len(held_out) == 256
    assert not {row["topic"] for row in train} & {row["topic"] for row in held_out}
    assert {row["instruction"] for row in held_out} == set(INSTRUCTIONS)
    assert len({tuple(row.values()) for row in train + held_out}) == len(train) + len(held_out)
    assert split_topics(list(TOPICS), 256) == (train, held_out)


def test_topics_are_distinct_words():
    assert len(set(TOPICS)) == len(TOPICS) > 150
    assert all(is_on_topic(f"We all like {topic}, and so do they.", topic) for topic in TOPICS)


@pytest.mark.parametrize("chat_template", [None, "{{ messages[0].content }}"])
def test_the_task_is_loaded(chat_template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    task = load_task(RLConfig(task="instructions", num_eval_prompts=26), tokenizer)
    row = task.eval[0]
    text = row["prompt"] if chat_template is None else row["prompt"][0]["content"]
    asked = INSTRUCTIONS[row["instruction"]].text.format(value=row["value"])
    assert text == USER_TEXT.format(topic=row["topic"], instruction=asked)
    assert len(task.eval) == 26
    assert task.accuracy == "followed"


def test_topics_of_a_file(tmp_path):
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps({"topic": topic}) + "\n" for topic in ("dragons", "castles", "dragons")))
    task = load_task(RLConfig(task="instructions", dataset=str(path), num_eval_prompts=5), build_tokenizer())
    assert len(task.train) == len(INSTRUCTIONS)
    assert {row["topic"] for row in [*task.train, *task.eval]} == {"dragons", "castles"}
    with pytest.raises(ValueError, match="held-out prompts are about topics of their own, 2 of them, and there are 2"):
        load_task(RLConfig(task="instructions", dataset=str(path), num_eval_prompts=20), build_tokenizer())


@pytest.mark.parametrize("topic", ["...", 7, None])
def test_a_topic_without_a_word_is_refused(tmp_path, topic):
    path = tmp_path / "topics.jsonl"
    path.write_text(json.dumps({"topic": topic}) + "\n")
    with pytest.raises(ValueError, match=r"row 1 has topic=.*Correct or remove the row"):
        load_task(RLConfig(task="instructions", dataset=str(path), num_eval_prompts=0), build_tokenizer())
