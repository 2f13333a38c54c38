"""Rewards by name: files that import what lies beside them, modules, factories, and nothing executed twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.rewards.choose import make_scorer
from common.rewards.load import load_reward, source_of
from tests import forked

ROOT = Path(__file__).parent.parent
FUNCTION = "def {name}(completions, **columns):\n    return [{value}] * len(completions)\n"


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """Each test has a search path, and modules, of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def value(where: str) -> float:
    (number,) = load_reward(where)(completions=["a"])
    return number


def refused(where: str) -> str:
    with pytest.raises(ValueError, match=r"rewards=") as caught:
        load_reward(where)
    return str(caught.value)


# Neighbours


def test_a_file_imports_what_lies_beside_it_also_when_it_is_called(tmp_path):
    write(tmp_path / "near.py", "def one():\n    return 1.0\n")
    write(tmp_path / "later.py", "def two():\n    return 2.0\n")
    file = write(
        tmp_path / "mine.py",
        "from near import one\n"
        "def f(completions, **columns):\n"
        "    from later import two\n"
        "    return [one() + two() for _ in completions]\n",
    )
    assert value(f"{file}:f") == 3.0
    assert sys.path[-1] == str(tmp_path) and sys.path[0] != str(tmp_path)


def test_so_does_a_rule_in_its_own_process(tmp_path):
    write(tmp_path / "near_rule.py", "def one():\n    return 1.0\n")
    write(tmp_path / "later_rule.py", "def two():\n    return 2.0\n")
    file = write(
        tmp_path / "ruled.py",
        "from common.rewards.rules import rule\nfrom near_rule import one\n"
        "@rule\n"
        "def f(completions, **columns):\n"
        "    from later_rule import two\n"
        "    return [one() + two() for _ in completions]\n",
    )
    scorer = make_scorer({}, {}, names=[f"{file}:f"], weights=None)
    assert scorer(["p"], ["c"], {})[0].tolist() == [3.0]
    assert "later_rule" not in sys.modules


def test_the_neighbour_comes_before_an_installed_module_of_its_name(tmp_path):
    write(tmp_path / "installed" / "both_have.py", "one = 2.0\n")
    sys.path.insert(0, str(tmp_path / "installed"))
    write(tmp_path / "both_have.py", "one = 1.0\n")
    file = write(tmp_path / "mine.py", "from both_have import one\n" + FUNCTION.format(name="f", value="one"))
    assert value(f"{file}:f") == 1.0


def test_two_neighbours_of_one_name_are_refused_since_python_knows_one(tmp_path):
    for folder, number in (("a", 1.0), ("b", 2.0)):
        write(tmp_path / folder / "near_two.py", f"number = {number}\n")
        write(tmp_path / folder / "mine.py", "import near_two\n" + FUNCTION.format(name="f", value="near_two.number"))
    assert value(f"{tmp_path}/a/mine.py:f") == 1.0
    message = refused(f"{tmp_path}/b/mine.py:f")
    assert f"{tmp_path}/b/mine.py imports near_two" in message and "Rename one of them" in message
    assert f"{tmp_path}/a/near_two.py, not {tmp_path}/b/near_two.py" in message


def test_neighbours_of_one_name_that_are_not_imported_are_no_matter(tmp_path):
    for folder in "ab":
        write(tmp_path / folder / "near_unused.py", "")
        write(tmp_path / folder / "mine.py", FUNCTION.format(name="f", value=1.0))
    write(tmp_path / "a" / "user.py", "import near_unused\n" + FUNCTION.format(name="f", value=1.0))
    assert [value(f"{tmp_path}/{file}:f") for file in ("a/user.py", "a/mine.py", "b/mine.py")] == [1.0] * 3


def test_a_neighbour_with_the_name_of_a_loaded_module_is_named(tmp_path):
    write(tmp_path / "common.py", "mine = 1.0\n")
    file = write(tmp_path / "mine.py", "from common import mine\n" + FUNCTION.format(name="f", value="mine"))
    message = refused(f"{file}:f")
    assert "ImportError" in message and f"{tmp_path}/common.py is not what it gets" in message


# Modules


def test_a_function_of_a_module_is_named_as_python_finds_it():
    from trl.rewards import think_format_reward

    assert load_reward("trl.rewards:think_format_reward") is think_format_reward
    assert list(make_scorer({}, {}, names=["trl.rewards:think_format_reward"], weights=None).functions) == [
        "think_format_reward"
    ]


def test_a_module_is_found_in_the_working_directory_and_by_functions_of_it_later(tmp_path, monkeypatch):
    write(tmp_path / "own_package" / "__init__.py", "")
    write(
        tmp_path / "own_package" / "rewards.py",
        "def f(completions, **columns):\n    import beside\n    return [2.0]\n",
    )
    write(tmp_path / "beside.py", "")
    monkeypatch.chdir(tmp_path)
    assert value("own_package.rewards:f") == 2.0


@pytest.mark.slow
def test_a_module_of_the_scripts_folder_is_found_from_anywhere(tmp_path):
    """A run is started in its folder; the module of a reward is then beside it, and an installed one beside Python."""
    write(tmp_path / "my_rewards.py", FUNCTION.format(name="f", value=1.0))
    arguments = ["--preset", "none", "--task", "prompts", "--dataset", "no.jsonl", "--sampler", "transformers"]
    arguments += ["--model", "tiny", "--reward", "my_rewards:f", "--reward", "my_rewards:nix"]
    done = forked.run([ROOT / "GRPO" / "grpo.py", *arguments], cwd=tmp_path)
    assert done.returncode == 2 and "dataset=no.jsonl: there is no such file" in done.stderr


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("no_such_module:f", ["there is no module no_such_module", "working directory", "path/to/file.py:function"]),
        ("trl.nowhere:f", ["there is no module trl.nowhere"]),
        ("trl.rewards:nowhere", ["trl/rewards/__init__.py defines no function 'nowhere'", "accuracy_reward"]),
        ("a b:f", ["'a b' is neither a file that ends in .py nor a module"]),
        ("mine.txt:f", ["there is no module mine.txt"]),
        (":f", ["need a function"]),
        ("mine.py:", ["need a function", "path/to/file.py:function"]),
    ],
    ids=str,
)
def test_what_cannot_be_found_is_named(where, parts):
    message = refused(where)
    assert all(part in message for part in parts), message


def test_a_module_that_fails_when_it_is_imported_is_named_with_the_reason(tmp_path, monkeypatch):
    write(tmp_path / "needs_more.py", "import not_installed_at_all\n")
    write(tmp_path / "divides.py", "1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert "module needs_more cannot be imported: ModuleNotFoundError: No module named 'not_installed" in refused(
        "needs_more:f"
    )
    assert "module divides cannot be imported: ZeroDivisionError" in refused("divides:f")


def test_a_function_written_with_a_dot_is_answered_with_a_colon():
    with pytest.raises(ValueError, match=r"Did you mean trl\.rewards:accuracy_reward\?"):
        make_scorer({}, {}, names=["trl.rewards.accuracy_reward"], weights=None)


# Once


COUNTS = "import builtins\nbuiltins.executed = getattr(builtins, 'executed', 0) + 1\n"


@pytest.fixture
def executed(monkeypatch):
    import builtins

    monkeypatch.setattr(builtins, "executed", 0, raising=False)
    return lambda: builtins.executed


def test_a_file_is_executed_once_whatever_it_is_called(tmp_path, monkeypatch, executed):
    functions = "".join(FUNCTION.format(name=name, value=1.0) for name in "fgh")
    file = write(tmp_path / "counted.py", COUNTS + functions)
    monkeypatch.chdir(tmp_path)
    make_scorer({}, {}, names=[f"{file}:f", "counted.py:g", "counted:h"], weights=None)
    assert executed() == 1


def test_a_module_that_is_imported_already_is_not_executed_as_a_file(tmp_path, monkeypatch, executed):
    write(tmp_path / "counted_too.py", COUNTS + FUNCTION.format(name="f", value=1.0))
    monkeypatch.chdir(tmp_path)
    assert value("counted_too:f") == value("counted_too.py:f") == 1.0
    assert executed() == 1


def test_a_file_that_was_changed_is_executed_again_as_in_a_notebook(tmp_path):
    file = write(tmp_path / "edited.py", FUNCTION.format(name="f", value=1.0))
    assert value(f"{file}:f") == 1.0
    write(file, FUNCTION.format(name="f", value=22.0))
    assert value(f"{file}:f") == 22.0


def test_a_script_may_name_itself(tmp_path):
    file = write(
        tmp_path / "itself.py",
        "from common.rewards.load import load_reward\n"
        + FUNCTION.format(name="f", value=1.0)
        + "print(load_reward('itself.py:f') is f)\n",
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, file.name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


# Factories


def test_a_factory_is_called_with_the_arguments_behind_its_name():
    where = "trl.rewards:get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)"
    scorer = make_scorer({}, {}, names=[where], weights=None)
    scorer.check_columns([])
    _, parts = scorer(["p", "p"], ["a", "b"], {}, completion_ids=[[1] * 3, [1] * 9])
    assert {name: part.tolist() for name, part in parts.items()} == {"get_soft_overlong_punishment": [-0.5, -1.0]}


def test_a_class_is_called_in_the_same_way(tmp_path):
    file = write(
        tmp_path / "classes.py",
        "class Judge:\n"
        "    def __init__(self, name='a:b', limits=(1,)):\n"
        "        self.number = float(len(name) + limits[0])\n"
        "    def __call__(self, completions, **columns):\n"
        "        return [self.number] * len(completions)\n",
    )
    assert value(f"{file}:Judge()") == 4.0 and value(f"{file}:Judge(name='x:y:z', limits=[2])") == 7.0
    assert f"{file}:Judge(...)" in refused(f"{file}:Judge")


@pytest.mark.parametrize(
    "call", ["(4, 2)", "(max_completion_len=x)", "(nix=1)", "(max_completion_len=4)", "(", "(**{})"]
)
def test_arguments_that_a_factory_does_not_take_are_refused(call):
    where = f"trl.rewards:get_soft_overlong_punishment{call}"
    if call == "(":
        assert "need a function" in refused(where)
    else:
        assert "get_soft_overlong_punishment(max_completion_len, soft_punish_cache) cannot be called" in refused(where)


def test_a_factory_that_is_not_called_is_answered_with_how():
    with pytest.raises(
        ValueError, match=r"no parameter `completions`.*file\.py:get_soft_overlong_punishment\(max_com"
    ):
        load_reward("trl.rewards:get_soft_overlong_punishment")


def test_the_file_of_a_reward_is_found_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("twice_spelled.py").write_text("def a(completions):\n    return [0.0] * len(completions)\nb = a\n")
    for where in ("twice_spelled.py:a", "twice_spelled:b"):
        load_reward(where)
        assert source_of(where).resolve() == tmp_path / "twice_spelled.py"
    assert source_of("math:sqrt") is None or source_of("math:sqrt").suffix != ".py"
