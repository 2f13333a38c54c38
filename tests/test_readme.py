"""What README.md shows works, and its map names every file."""

import re
from pathlib import Path

import pytest

from common.logprobs import token_logprobs
from common.rewards.choose import load_reward
from common.trainer import OnPolicyTrainer
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from tests.toy import toy_config, toy_task

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(beginning: str) -> str:
    (found,) = [text for text in BLOCKS if text.startswith(beginning)]
    return found


def test_the_reward_function_shown_can_be_loaded_and_called(tmp_path):
    (tmp_path / "my_rewards.py").write_text(block("# my_rewards.py"))
    reward = load_reward(f"{tmp_path / 'my_rewards.py'}:short_and_right")
    scores = reward(prompts=["a", "b"], completions=["it is 7", "no"], target=[7, 8], nums=[[3, 4], [4, 4]])
    assert scores == pytest.approx([0.993, -0.002])


def test_the_task_shown_can_be_trained_on(tiny_folder, tmp_path):
    names = {}
    source = block("from common.tasks import Task").replace("GRPOTrainer(GRPOConfig", "config = (GRPOConfig")
    exec(source.replace(", task=task).train()", ")"), names)  # the block as it stands, up to the start of the run
    assert names["config"].model.startswith("Qwen/")
    config = toy_config(tiny_folder, tmp_path / "run", prompts_per_step=2)
    metrics = GRPOTrainer(config, task=names["task"]).train()
    assert 0 <= metrics["reward/right"] <= 1


def test_the_algorithm_shown_trains(tiny_folder, tmp_path):
    names = {
        "OnPolicyTrainer": OnPolicyTrainer,
        "BestOfConfig": GRPOConfig,
        "token_logprobs": token_logprobs,
        "my_advantages": lambda scores: scores - scores.mean(),
    }
    exec(block("class BestOfTrainer"), names)
    trainer = names["BestOfTrainer"](toy_config(tiny_folder, tmp_path / "run"), task=toy_task())
    before = [parameter.detach().clone() for parameter in trainer.policy.parameters]
    metrics = trainer.train()
    assert metrics["policy/grad_norm"] > 0 and metrics["entropy"] > 0
    assert any((a != b).any() for a, b in zip(before, trainer.policy.parameters, strict=True))


def test_the_map_names_every_module():
    listed = README.split("## The files")[1]
    for path in sorted((ROOT / "common").glob("*.py")):
        assert path.name in listed or path.stem == "__init__" or path.name in README, path.name
    for name in re.findall(r"^      (\w+\.py)", listed, re.MULTILINE):
        assert (ROOT / "common" / name).exists(), name


def test_every_setting_is_on_top_of_the_script():
    script = (ROOT / "GRPO" / "grpo.py").read_text()
    for name in GRPOConfig.__dataclass_fields__:
        assert re.search(rf"^    {name}=", script, re.MULTILINE), name


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"
