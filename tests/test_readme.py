"""What README.md and docs/ show works; docs/files.md names every file; what the documents name is there."""

import logging
import re
from pathlib import Path

import pytest
import torch

from common.config import RLConfig
from common.logprobs import token_logprobs
from common.rewards.choose import load_reward
from common.rewards.rules import is_rule
from common.trainer import OnPolicyTrainer
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from tests.test_architecture import ORDER
from tests.toy import algorithms, toy_config, toy_task, trained_weights
from tools.breakages import read_breakages, table

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("examples/*/*.md")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(PAGES)}
SHOWN = [text for name, text in TEXTS.items() if name == "README.md" or name.startswith("docs/")]
BLOCKS = re.findall(r"```python\n(.*?)```", "\n".join(SHOWN), re.DOTALL)
FILES = TEXTS["docs/files.md"]


def block(beginning: str) -> str:
    (found,) = [text for text in BLOCKS if text.startswith(beginning)]
    return found


# What is shown


def test_the_reward_function_shown_can_be_loaded_and_called(tmp_path):
    (tmp_path / "my_rewards.py").write_text(block("# my_rewards.py"))
    reward = load_reward(f"{tmp_path / 'my_rewards.py'}:short_and_right")
    scores = reward(prompts=["a", "b"], completions=["it is 7", "no"], target=[7, 8], nums=[[3, 4], [4, 4]])
    assert scores == pytest.approx([0.993, -0.002])


def test_the_rule_shown_is_a_rule(tmp_path):
    (tmp_path / "my.py").write_text(block("from common.rewards.rules"))
    reward = load_reward(f"{tmp_path / 'my.py'}:polite")
    assert is_rule(reward) and reward(["a", "b"], completions=["Please wait", "no"]) == [1.0, 0.0]


def test_the_task_shown_can_be_trained_on(tiny_folder, tmp_path):
    names = {}
    source = block("from common.tasks import Task").replace("GRPOTrainer(GRPOConfig", "config = (GRPOConfig")
    exec(source.replace(", task=task).train()", ")"), names)  # the block as it stands, up to the start of the run
    assert names["config"].model.startswith("Qwen/")
    config = toy_config(tiny_folder, tmp_path / "run", prompts_per_step=2)
    metrics = GRPOTrainer(config, task=names["task"]).train()
    assert 0 <= metrics["reward/right"] <= 1


@pytest.fixture
def algorithm_shown(toy_folder, tmp_path):
    """Makes the trainer that README.md shows, with other settings."""
    names = {
        "OnPolicyTrainer": OnPolicyTrainer,
        "BestOfConfig": GRPOConfig,
        "token_logprobs": token_logprobs,
        "my_advantages": lambda scores: scores - scores.mean(),
    }
    exec(block("class BestOfTrainer"), names)

    def make(name: str, **settings: object) -> OnPolicyTrainer:
        config = toy_config(toy_folder, tmp_path / name, num_steps=3, learning_rate=1e-2, **settings)
        return names["BestOfTrainer"](config, task=toy_task())

    return make


def test_the_algorithm_shown_trains(algorithm_shown):
    trainer = algorithm_shown("run")
    before = [parameter.detach().clone() for parameter in trainer.policy.parameters]
    metrics = trainer.train()
    assert metrics["policy/grad_norm"] > 0 and metrics["entropy"] > 0
    assert any((a != b).any() for a, b in zip(before, trainer.policy.parameters, strict=True))


@pytest.mark.parametrize(
    "setting", [{"kl_coef": 10.0}, {"whiten_advantages": True}, {"average_over": "constant"}], ids=str
)
def test_the_algorithm_shown_ignores_no_setting(algorithm_shown, caplog, setting):
    with caplog.at_level(logging.WARNING, logger="nanorlhf"):
        changed = trained_weights(algorithm_shown("changed", **setting))
    assert not caplog.messages
    assert not torch.equal(changed, trained_weights(algorithm_shown("default")))


# What is named


def listed() -> set[str]:
    """The files that docs/files.md lists under the heading of their folder, as paths from the root."""
    sections = re.split(r"^#+ (?=common/)", FILES.split("\n## The rest")[0], flags=re.MULTILINE)[1:]
    return {
        section.split("\n", 1)[0] + file
        for section in sections
        for file in re.findall(r"^\| `(\w+\.py)`", section, re.MULTILINE)
    }


def test_the_map_names_every_module_of_common_and_no_other():
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("common/**/*.py")}
    assert listed() == {path for path in modules if not Path(path).stem.startswith("__")}


@pytest.mark.parametrize("name", algorithms())
def test_the_map_or_the_folders_own_readme_names_every_module_of_an_algorithm(name):
    lower = name.lower()
    known = {f"{lower}.py", f"{lower}_trainer.py", f"test_{lower}.py", "__init__.py"}
    for path in sorted((ROOT / name).glob("*.py")):
        named = f"{name}/{path.name}" in FILES or path.name in TEXTS[f"{name}/README.md"]
        assert path.name in known or named, path.name


def test_the_rooms_are_in_the_order_in_which_they_may_import():
    paragraph = FILES.split("## Who imports whom")[1].split("An algorithm imports")[0]
    shown = re.findall(r"common\.\w+", paragraph)
    assert shown == [room for room in ORDER if room.startswith("common.")]


def test_every_setting_is_on_top_of_the_script_and_in_a_group():
    script = (ROOT / "GRPO" / "grpo.py").read_text()
    for name in GRPOConfig.__dataclass_fields__:
        assert re.search(rf"^    {name}=", script, re.MULTILINE), name
    groups = TEXTS["docs/settings.md"].split("## The groups")[1]
    for name in RLConfig.__dataclass_fields__:
        assert f"`{name}`" in groups, name


def anchors(text: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


# A path from the root: folders of the repository, then a file.
PATH = re.compile(
    r"(?<![\w/.])((?:common|tests|tools|docs|benchmarks|examples|[A-Z]\w+)/[\w./-]*\w\.(?:py|md|yaml|sh))\b"
)


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_a_page_names_are_there(page):
    for path in PATH.findall(TEXTS[page]):
        assert path.startswith("Name/") or (ROOT / path).exists(), path  # Name is any algorithm


@pytest.mark.parametrize("page", TEXTS)
def test_modules_that_a_page_names_are_there(page):
    for module in re.findall(r"(?:python -m|from) ((?:common|tests|benchmarks)(?:\.\w+)*)", TEXTS[page]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module


def test_the_table_of_breakages_is_that_of_the_list_and_the_list_is_true():
    breakages = read_breakages()
    assert table(breakages) in TEXTS["tests/README.md"], "run tools/breakages.py --write"
    for breakage in breakages:
        compile(breakage.broken((ROOT / breakage.file).read_text()), breakage.file, "exec")
        module, _, test = breakage.test.partition("::")
        assert breakage.equivalent or f"def {test}(" in (ROOT / module).read_text(), breakage.test
