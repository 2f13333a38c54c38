"""A task made in Python, and a trainer made from it: what does not belong together is said when it is made."""

import numpy as np
import pandas
import pytest
from datasets import Dataset, DatasetDict

from common.rewards.scorer import Scorer
from common.tasks import Task, check_rows, task_scorer
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from tests.toy import share_of_digits, toy_config, toy_trainer

ROWS = [{"prompt": f"{a} make", "total": a} for a in range(4)]


def right(completions, total, **columns):
    return [float(str(number) in text) for number, text in zip(total, completions, strict=True)]


def task(**changes: object) -> Task:
    return Task(**{"train": ROWS, "rewards": {"right": right}, "accuracy": "right"} | changes)


def test_rows_and_rewards_are_enough(tiny_folder, tmp_path):
    made = Task(train=ROWS, rewards={"right": right, "digits": share_of_digits})
    assert (made.eval, made.accuracy) == ([], None) and Task(train=ROWS, eval=None).eval == []
    assert task_scorer(made, GRPOConfig()).weights == {"right": 1.0, "digits": 1.0}
    config = toy_config(tiny_folder, tmp_path / "run", num_steps=1)
    assert GRPOTrainer(config, task=made).train()["reward/right"] >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "rows.jsonl"}, r"Task\(train=str\): need a list of rows"),
        ({"train": DatasetDict({"train": Dataset.from_list(ROWS)})}, r"Task\(train=DatasetDict\).*one split"),
        ({"train": None}, r"Task\(train=NoneType\)"),
        ({"train": (row for row in ROWS)}, r"Task\(train=generator\)"),
        ({"eval": 3}, r"Task\(eval=int\)"),
        ({"rewards": [right]}, r"Task\(rewards=list\): need a dict.*rewards=\{\"right\": right\}"),
        ({"rewards": right}, r"Task\(rewards=function\)"),
        ({"reward_weights": [1.0]}, r"Task\(reward_weights=list\).*\{'right': 1.0\}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_of_another_type_are_refused_when_the_task_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        task(**changes)


def test_an_unknown_field_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match=r"Task\(train_dataset=..., reward_funcs=...\)") as caught:
        Task(train_dataset=ROWS, reward_funcs={})
    assert "mean train by train_dataset? Did you mean rewards by reward_funcs?" in str(caught.value)
    with pytest.raises(TypeError, match=r"a task has train, eval, rewards.*default_rewards\.$"):
        task(foo=1)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"rewards": {}, "accuracy": None}, {}, r"the task has no rewards.*rewards=\[\"my_rewards\.py:right\"\]"),
        ({"reward_weights": {"q": 1.0}}, {}, r"no reward 'q', no weight for 'right'\. The rewards are right\."),
        ({"reward_weights": {"right": 1.0, "q": 1.0}}, {}, r"\): no reward 'q'\. The rewards are right\."),
        ({"reward_weights": {}}, {}, r"no weight for 'right'"),
        ({"reward_weights": {"right": float("nan")}}, {}, r"nan is no finite number"),
        ({"reward_weights": {"right": 10**400}}, {}, r"10000.* is no finite number"),
        ({"reward_weights": {"right": "1"}}, {}, r"'1' is no finite number"),
        ({"accuracy": "wrong"}, {}, r"Task\(accuracy='wrong'\): no reward has this name; there are right\."),
        ({"format": "wrong"}, {}, r"Task\(format='wrong'\)"),
        ({"accuracy": "wrong"}, {"rewards": ["right"]}, r"Task\(accuracy='wrong'\)"),
        ({"rewards": {"right": right, "b": len}}, {}, r"reward 'b': len\(obj\) takes obj by position only"),
    ],
)
def test_what_does_not_belong_together_is_refused_before_a_model_is_loaded(
    toy_folder, tmp_path, monkeypatch, changes, settings, message
):
    monkeypatch.setattr("common.trainer.load_policy", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(toy_config(toy_folder, tmp_path / "run", **settings), task=task(**changes))
    assert not (tmp_path / "run").exists()


def test_a_function_that_takes_the_name_of_the_tasks_accuracy_trains_nothing(toy_folder, tmp_path):
    (tmp_path / "mine.py").write_text("def sum(completions):\n    return [1.0] * len(completions)\n")
    with pytest.raises(ValueError, match=r"mine\.py:sum': the task has a reward 'sum' of its own.*such as my_sum"):
        toy_trainer(toy_folder, tmp_path / "run", rewards=[f"{tmp_path / 'mine.py'}:sum"])


def test_accuracy_may_name_a_reward_of_the_settings_or_one_that_is_not_used(tmp_path):
    (tmp_path / "mine.py").write_text("def exact(completions):\n    return [1.0] * len(completions)\n")
    config = GRPOConfig(rewards=[f"{tmp_path / 'mine.py'}:exact"])
    for accuracy in ("exact", "right"):
        assert isinstance(task_scorer(task(accuracy=accuracy), config), Scorer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": []}, r"Task\(train=\[\]\): no rows"),
        ({"train": Dataset.from_list(ROWS).select([])}, r"no rows"),
        ({"train": [{"text": "a"}]}, r"Task\(train=...\): row 0 is \{'text': 'a'\}\. Need a dict with the key"),
        ({"train": [*ROWS, "text"]}, r"row 4 is 'text'"),
        ({"train": [{"prompt": None}]}, r"row 0"),
        ({"train": [{"prompt": 7}]}, r"row 0"),
        ({"train": [{"prompt": []}]}, r"row 0"),
        ({"train": [{"prompt": [{"content": "a"}]}]}, r"row 0"),
        ({"train": [{"prompt": ["a"]}]}, r"row 0"),
        ({"train": [*ROWS, {"prompt": "a"}]}, r"row 4 has no total, which row 0 has"),
        ({"eval": [{"text": "a"}]}, r"Task\(eval=...\): row 0"),
    ],
)
def test_rows_without_a_prompt_or_a_column_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        check_rows(task(**rows))


def test_rows_may_be_messages_or_a_data_set():
    check_rows(task(train=[{"prompt": [{"role": "user", "content": "a"}]}], eval=Dataset.from_list(ROWS)))


def test_the_held_out_rows_need_the_columns_too(toy_folder, tmp_path):
    def needs(completions, total):
        return [0.0] * len(completions)

    made = task(eval=[{"prompt": "a"}], rewards={"right": needs})
    with pytest.raises(ValueError, match=r"needs the columns total; the held-out part has only the prompt"):
        GRPOTrainer(toy_config(toy_folder, tmp_path / "run"), task=made)


# The trainer


CONFIG = GRPOConfig(model="nowhere")


@pytest.mark.parametrize(
    ("args", "given", "shown"),
    [
        (("Qwen/Qwen2.5-0.5B",), {}, "str"),
        (("Qwen/Qwen2.5-0.5B", right), {"args": CONFIG}, "args=..., str, function"),
        ((CONFIG, right), {}, "function"),
        ((CONFIG, [right]), {"train_dataset": ROWS}, "train_dataset=..., list"),
    ],
)
def test_a_trainer_that_is_made_as_elsewhere_is_answered_with_how_it_is_made_here(args, given, shown):
    with pytest.raises(TypeError) as caught:
        GRPOTrainer(*args, **given)
    assert str(caught.value).startswith(f"GRPOTrainer({shown}): nothing reads that.")
    assert "GRPOTrainer(GRPOConfig(model=...), task=Task(train=..., rewards=...))" in str(caught.value)


def test_a_task_of_another_type_is_refused(toy_folder, tmp_path):
    with pytest.raises(ValueError, match=r"task=list: need a Task"):
        GRPOTrainer(toy_config(toy_folder, tmp_path / "run"), task=ROWS)


def test_rows_may_be_a_data_set(toy_folder, tmp_path):
    """As trl's train_dataset; keys that others' messages have do not reach the template as None."""
    rows = [{"prompt": f"{a} make", "total": a} for a in range(6)]
    scores = []
    for name, train in (
        ("list", rows),
        ("set", Dataset.from_list([*rows, {"prompt": "7", "total": 7}]).select(range(6))),
    ):
        made = Task(train=train, rewards={"digits": share_of_digits})
        scores.append(GRPOTrainer(toy_config(toy_folder, tmp_path / name), task=made).train()["score"])
    assert scores[0] == scores[1]
    messages = [[{"role": "user", "content": "a", "name": "x"}], [{"role": "user", "content": "b"}]]
    made = Task(train=Dataset.from_list([{"prompt": prompt} for prompt in messages]))
    assert [row["prompt"] for row in made.train] == messages


@pytest.mark.parametrize(
    "rows",
    [
        pandas.DataFrame({"prompt": ["a"]}),
        Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset(),
        DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}),
        {"prompt": ["a"]},
    ],
    ids=["data frame", "stream", "splits", "columns"],
)
def test_what_is_not_found_by_its_number_is_refused(rows):
    with pytest.raises(ValueError, match=r"need a list of rows, or one split of a data set"):
        Task(train=rows)


def test_weights_may_be_numbers_of_numpy(toy_folder, tmp_path):
    made = task(reward_weights={"right": np.float32(0.5)})
    assert GRPOTrainer(toy_config(toy_folder, tmp_path / "run"), task=made).scorer.weights == {"right": 0.5}
