"""``python -m common.evaluation`` with prompts and rewards of one's own."""

import json
import re
from pathlib import Path

import pytest
import torch

from common.cli import parse_settings
from common.config import RLConfig
from common.embedded.policy import build_tokenizer, save_untrained
from common.evaluation import command, identity
from common.evaluation.command import Evaluation, evaluate
from common.evaluation.identity import reward_digest, reward_files
from common.evaluation.results import table
from common.evaluation.settings import EvaluationSettings
from common.runs.measures import mean_interval
from common.tasks import load_task
from tests import forked
from tests.test_evaluation_command import CHAT_TEMPLATE, loads, result_of, sampled, settings, write  # noqa: F401
from tests.test_reward_model import save_pair_encoder

ROWS = [{"prompt": f"{a} {a + 1} make", "word": str(a)} for a in range(6)]
REWARDS = """
def says(completions, word, **columns):
    return [float(each in text) for each, text in zip(word, completions)]

def length(completions):
    return [float(len(text)) for text in completions]

def logs(completions, trainer_state, log_metric, log_extra):
    log_metric("size", len(completions))
    log_extra("half", [len(text) / 2 for text in completions])
    return [float(trainer_state.max_steps)] * len(completions)

def messages(completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]

def sometimes(completions, word, **columns):
    return [float(len(text)) if each in "01" else None for each, text in zip(word, completions)]

def never(completions):
    return [None] * len(completions)

def equation(completions):
    return [1.0] * len(completions)
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Each test begins in a folder with prompts and rewards, and must not reach for the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(Path("mine.jsonl"), ROWS)
    Path("mine.py").write_text(REWARDS)
    return tmp_path


def own(model: Path, *rewards: str, **changes: object) -> EvaluationSettings:
    defaults = {"task": "prompts", "dataset": "mine.jsonl", "num_problems": None}
    defaults["rewards"] = [f"mine.py:{name}" for name in rewards]
    return settings(model, **(defaults | changes))


def heads_of(text: str) -> dict[str, str]:
    heads, _, cells = (line.strip("| ").split("|") for line in text.splitlines()[-3:])
    return dict(zip(map(str.strip, heads), map(str.strip, cells), strict=True))


@pytest.mark.slow
def test_own_prompts_are_evaluated_with_own_rewards_by_command(tiny_folder):
    words = [
        "-m",
        "common.evaluation",
        "--model",
        tiny_folder,
        "--task",
        "prompts",
        "--dataset",
        "mine.jsonl",
        "--sampler",
        "transformers",
    ]
    words += ["--num_samples", "4", "--max_completion_length", "24", "--output_dir", "out"]
    words += ["--reward", "mine.py:says", "--reward", "mine.py:length", "-0.5"]
    done = forked.run(words)
    assert done.returncode == 0, done.stderr
    score, rows = result_of(Path("out"))
    completions = [completion for row in rows for completion in row["completions"]]
    assert [row["word"] for row in rows] == [row["word"] for row in ROWS] and len(completions) == 24
    assert all(c["score"] == c["parts"]["says"] - 0.5 * c["parts"]["length"] for c in completions)
    assert all(c["parts"]["length"] == len(c["text"]) and "correct" not in c for c in completions)
    for name in ("says", "length"):
        assert score["rewards"][name] == pytest.approx(sum(c["parts"][name] for c in completions) / 24)
    assert score["score"] == pytest.approx(sum(c["score"] for c in completions) / 24)
    low, high = score["score_ci95"]
    assert low < score["score"] < high and "accuracy" not in score
    cells = heads_of(done.stdout)
    assert list(cells)[1:6] == ["score", "95 % interval", "reward says", "reward length", "length"]
    assert cells["score"] == f"{score['score']:.3f}" and cells["95 % interval"] == f"{low:.3f} to {high:.3f}"


def test_the_reward_that_is_named_gives_accuracy_and_pass_at_k(tiny_folder):
    (score,) = evaluate(own(tiny_folder, "says", "length", accuracy="says", num_samples=2))
    (folder,) = Path("evaluations").iterdir()
    correct = [[c["correct"] for c in row["completions"]] for row in result_of(folder)[1]]
    assert score["accuracy"] == sum(map(sum, correct)) / 12
    assert score["pass@2"] == sum(map(any, correct)) / 6
    cells = heads_of(table([score]))
    assert list(cells)[1:6] == ["accuracy", "95 % interval", "pass@2", "score", "95 % of scores"]


def test_own_rewards_stand_beside_those_of_a_named_task(tiny_folder):
    (score,) = evaluate(settings(tiny_folder, rewards=["equation", "mine.py:length"], reward_weights=[1.0, 0.0]))
    assert score["rewards"].keys() == {"equation", "length"} and score["score"] == score["accuracy"]
    assert "format" not in score and "format" not in heads_of(table([score]))
    (other,) = evaluate(settings(tiny_folder, rewards=["mine.py:length"]))
    assert "accuracy" not in other and score["rewards"]["length"] == other["rewards"]["length"]
    assert other["score"] == pytest.approx(other["rewards"]["length"])


def test_a_reward_model_judges_too(tiny_folder):
    judge = save_pair_encoder(Path("judge"))
    changes = {"rewards": [str(judge), "mine.py:length"], "reward_weights": [1.0, 0.0]}
    (score,) = evaluate(own(tiny_folder, **changes, num_samples=2))
    assert score["score"] == pytest.approx(score["rewards"]["judge"]) and score["rewards_ci95"]["judge"]


def test_reward_models_get_the_gpu_that_vllm_has_used(tiny_folder):
    judge = save_pair_encoder(Path("judge"))
    levels = [
        Evaluation(own(tiny_folder, "length", **changes)).config.vllm_sleep_level
        for changes in ({}, {"rewards": [str(judge)]})
    ]
    assert levels == [0, 2]


def test_what_rewards_log_is_kept(tiny_folder):
    (score,) = evaluate(own(tiny_folder, "logs", output_dir="out"))
    assert score["logged"] == {"size": 12.0} and score["rewards"] == {"logs": 1.0}
    for row in result_of(Path("out"))[1]:
        assert all(c["extra"] == {"half": len(c["text"]) / 2} for c in row["completions"])


def test_a_reward_without_a_say_has_no_mean_and_no_interval(tiny_folder):
    (score,) = evaluate(own(tiny_folder, "sometimes", "never", "length", output_dir="out"))
    assert score["rewards"]["never"] is None and score["rewards_ci95"]["never"] is None
    assert heads_of(table([score]))["reward never"] == "-"
    said = [c["parts"]["sometimes"] for row in result_of(Path("out"))[1][:2] for c in row["completions"]]
    assert score["rewards"]["sometimes"] == pytest.approx(sum(said) / 4)
    json.loads(Path("out/score.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_chat_prompts_and_functions_of_messages(tmp_path):
    folder = save_untrained(tmp_path / "model", hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    write(Path("chat.jsonl"), [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS])
    (score,) = evaluate(own(folder, "messages", "length", dataset="chat.jsonl"))
    assert score["rewards"]["messages"] == score["rewards"]["length"]


def test_a_file_of_prompts_may_be_the_task(tiny_folder):
    named = Evaluation(own(tiny_folder, "says"))
    of_file = Evaluation(own(tiny_folder, "says", task="mine.jsonl", dataset=None))
    assert named.prompts.texts == of_file.prompts.texts and of_file.prompts.columns["word"]


def test_an_edited_reward_is_another_evaluation(tiny_folder):
    one = Evaluation(own(tiny_folder, "length")).name
    assert Evaluation(own(tiny_folder, "length")).name == one
    assert Evaluation(own(tiny_folder, "length", reward_weights=[2.0])).name != one
    Path("mine.py").write_text(REWARDS.replace("len(text)", "len(text) + 1"))
    assert Evaluation(own(tiny_folder, "length")).name != one


BESIDE = {
    "mine.py": """
import package.inner
from package import constants
def says(completions, word, **columns):
    from lazy import of_three
    import importlib
    importlib.import_module("named")
    return of_three(completions)
""",
    "package/__init__.py": "",
    "package/inner.py": "from .deeper import other\nfrom . import besides",
    "package/deeper/__init__.py": "from ..constants import three",
    "package/deeper/other.py": "from elsewhere import three",
    "package/besides.py": "",
    "package/constants.py": "three = 3",
    "lazy.py": "def of_three(completions):\n    from package import constants\n    return [3] * len(completions)",
    "named.py": "",
    "../working/elsewhere.py": "import broken\nthree = 3",
    "../working/broken.py": "def",
}


@pytest.fixture
def beside(tmp_path, monkeypatch) -> dict[str, Path]:
    """Modules that a reward uses, beside it and in the working directory, and two that it does not."""
    files = BESIDE | {"unused.py": "", "package/unused.py": ""}
    for name, content in files.items():
        (tmp_path / "beside" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "beside" / name).write_text(content)
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(identity, "source_of", lambda where: tmp_path / "beside" / "mine.py")  # without importing it
    return {name: (tmp_path / "beside" / name).resolve() for name in files}


def test_a_reward_is_its_file_and_every_module_that_it_imports_directly_or_not(beside):
    used = reward_files("mine.py:says")
    assert used[0] == beside["mine.py"] and set(used) == {beside[name] for name in BESIDE}
    before = reward_digest("mine.py:says")
    for name in sorted(beside):
        content = beside[name].read_text()
        beside[name].write_text(content + "\n")
        assert (reward_digest("mine.py:says") == before) == name.endswith("unused.py"), name
        beside[name].write_text(content)
    assert reward_digest("mine.py:says") == before


def test_a_function_of_a_package_is_its_modules_and_not_those_that_are_installed(beside, monkeypatch):
    monkeypatch.setattr(identity, "source_of", lambda where: beside["package/inner.py"])
    beside_it = {beside[name] for name in ("mine.py", "lazy.py", "named.py")}
    assert set(reward_files("package.inner:f")) == {beside[name] for name in BESIDE} - beside_it
    monkeypatch.setattr(identity, "source_of", lambda where: Path(json.__file__))
    assert {file.parent for file in reward_files("json:loads")} == {Path(json.__file__).parent}


EDITED = """
import sys
from pathlib import Path
from common.evaluation.command import Evaluation
from tests.test_own_evaluation import own
chosen = own(Path(sys.argv[1]), "says")
print(Evaluation(chosen).name)
if sys.argv[2:]:
    Path("package/constants.py").write_text("three = 4")
    try:
        print(Evaluation(chosen).name)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_an_edited_module_beside_a_reward_is_another_evaluation_in_a_new_process(tiny_folder, beside, monkeypatch):
    monkeypatch.chdir(beside["mine.py"].parent)
    write(Path("mine.jsonl"), ROWS)
    Path("package/deeper/other.py").write_text("")
    said = []
    for argument in (["edit"], []):
        said += forked.run(["-c", EDITED, tiny_folder, *argument]).stdout.splitlines()
    assert said[0] != said[2] and re.search(r"package/constants.py, which it imports, was edited after", said[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": None}, r"task='prompts' without a data set.*--dataset"),
        ({"rewards": None}, r"task='prompts' without rewards.*--reward"),
        ({"rewards": ["mine.py:nix"]}, r"mine.py defines no function 'nix'"),
        (
            {"rewards": ["mine.py:says"], "dataset": "bare.jsonl"},
            r"reward 'says' needs the columns word; .* has other",
        ),
        ({"rewards": ["builtins:len"]}, r"len\(obj\) takes obj by position only"),
        ({"rewards": ["mine.py:says"], "reward_weights": [1.0, 2.0]}, r"2 reward_weights for 1 rewards"),
        ({"reward_weights": [1.0], "rewards": None}, r"reward_weights=\[1.0\] without rewards"),
        (
            {"task": "countdown", "dataset": None, "rewards": ["mine.py:equation"]},
            r"py:equation.*of its own",
        ),
        ({"accuracy": "length"}, r"accuracy='length': no reward has this name; there are says\. Pass --accuracy"),
        ({"reward_format": "chat"}, r"reward_format='chat': need one of auto, text, conversational"),
        (
            {"task": "countdown", "dataset": None, "rewards": None, "dataset_split": "x"},
            r"dataset_split=x without data",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(tiny_folder, monkeypatch, changes, message):
    monkeypatch.setattr(command, "load", lambda source: 1 / 0)
    write(Path("bare.jsonl"), [{"prompt": "a", "other": 1}])
    with pytest.raises(ValueError, match=message):
        evaluate(own(tiny_folder, "says", **changes))
    assert not Path("evaluations").exists()


def test_rewards_are_written_as_in_training():
    words = ["--model", "a", "--task", "prompts", "--reward", "mine.py:says", "0.5", "--reward=mine.py:length"]
    read = parse_settings(EvaluationSettings, words)
    assert (read.rewards, read.reward_weights) == (["mine.py:says", "mine.py:length"], [0.5, 1.0])
    assert parse_settings(EvaluationSettings, words[:6]).reward_weights is None


def test_the_interval_of_a_mean_by_hand():
    """Four prompts of two completions each: means 1, 2, 3, 6; their mean is 3, their deviation 2.160."""
    values = torch.tensor([0.0, 2.0, 2.0, 2.0, 1.0, 5.0, 6.0, float("nan")])
    assert mean_interval(values, 2) == pytest.approx([3 - 1.96 * 2.160247 / 2, 3 + 1.96 * 2.160247 / 2])
    assert mean_interval(values[:2], 2) is None and mean_interval(torch.full((4,), torch.nan), 2) is None


FAILS = """
def fails(completions, word, **columns):
    return [float(each in text) if each != "4" else 1 / 0 for each, text in zip(word, completions)]
"""


def test_a_reward_that_fails_costs_no_completions_whoever_judges_them_then(tiny_folder, sampled):  # noqa: F811
    refused = r"'fails' raised ZeroDivisionError.*Fix the function.*kept in (\S+), and the same command"
    for changes in ({}, {"output_dir": "out"}):
        Path("mine.py").write_text(REWARDS + FAILS)
        with pytest.raises(ValueError, match=refused) as caught:
            evaluate(own(tiny_folder, "fails", **changes))
        (path,) = Path().rglob("*.unfinished.jsonl")
        assert re.search(refused, str(caught.value))[1] == str(path) and len(path.read_text().splitlines()) == 7
        Path("mine.py").write_text(REWARDS + FAILS.replace("1 / 0", "2.0"))
        (score,) = evaluate(own(tiny_folder, "fails", **changes))
        assert sum(sampled) == 6 and not path.exists() and score["score"] > 0
        sampled.clear()
    with pytest.raises(ValueError, match="kept in"):
        Path("mine.py").write_text(REWARDS + FAILS)
        evaluate(own(tiny_folder, "fails"))
    (score,) = evaluate(own(tiny_folder, "length", reward_weights=[2.0], reward_format="text", reward_time_limit=0.0))
    assert sum(sampled) == 6 and score["score"] > 0


def test_corrected_columns_take_the_completions_of_the_same_prompts(tiny_folder, sampled):  # noqa: F811
    Path("mine.py").write_text(REWARDS + FAILS)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        evaluate(own(tiny_folder, "fails"))
    write(Path("mine.jsonl"), [row | {"word": "0"} for row in ROWS])
    evaluate(own(tiny_folder, "fails"))
    assert sampled == [6]


def test_kept_completions_are_scored_by_other_rewards_without_the_model(tiny_folder, sampled, loads):  # noqa: F811
    (first,) = evaluate(own(tiny_folder, "says", num_samples=2, keep_completions=True))
    (kept,) = Path("evaluations").glob("*.unfinished.jsonl")
    (second,) = evaluate(own(tiny_folder, "length", num_samples=2, keep_completions=True))
    assert sampled == [6] and len(loads) == 1 and kept.is_file()
    (again,) = evaluate(own(tiny_folder, "length", num_samples=2, output_dir="again"))  # not kept: sampled and removed
    assert sampled == [6, 6] and len(loads) == 2
    both = [result_of(folder)[1] for folder in Path("evaluations").iterdir() if folder.is_dir()]
    texts = [[[c["text"], c["length"], c["truncated"]] for c in row["completions"]] for rows in both for row in rows]
    assert texts[:6] == texts[6:]
    means = ("score", "length", "truncated")
    assert [second[name] for name in means] == [again[name] for name in means] != [first[name] for name in means]


def test_the_rows_that_training_holds_out_are_evaluated_with_the_rewards_of_its_task(tiny_folder):
    Path("pairs").mkdir()
    texts = [f"\n\nHuman: {word} one\n\nAssistant: yes" for word in ("make", "two", "four", "five", "six")]
    write(Path("pairs/train.jsonl"), [{"chosen": text, "rejected": text} for text in texts])
    config = RLConfig(task="hh_rlhf", dataset="pairs/train.jsonl", num_eval_prompts=2)
    held_out = [row["prompt"] for row in load_task(config, build_tokenizer()).eval]
    changes = {"task": "hh_rlhf", "dataset": "pairs/train.jsonl", "rewards": ["mine.py:length"]}
    evaluate(own(tiny_folder, **changes, num_held_out=2, output_dir="out"))
    assert [row["prompt"] for row in result_of(Path("out"))[1]] == held_out
    (score,) = evaluate(settings(tiny_folder, num_held_out=4, num_problems=None))
    assert score["num_problems"] == 4 and score["rewards"].keys() == {"format", "equation"}
