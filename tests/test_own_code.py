"""Code that comes with a model is run only when trust_remote_code says so: nobody is asked, and no "y" counts."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from common.check_model import read_model
from common.config import RLConfig
from common.embedded import load_tokenizer, skeleton
from common.evaluation.command import evaluate
from common.evaluation.settings import EvaluationSettings
from common.merge import MergeSettings, merge
from common.models.loading import load_policy
from common.rewards.reward_model import RewardModel
from PPO.scored_model import scored_model
from tests.toy import ROOT

FOLDERS = ("common", "GRPO", "PPO", "RAFT", "RLOO", "ReMax", "Reinforce", "VinePPO", "examples", "tools", "benchmarks")
# Classes that read no auto_map.
PLAIN = {"GenerationConfig", "PeftModel", "Qwen2ForCausalLM"}


def test_every_call_that_may_load_code_says_whether_it_may():
    silent = []
    for file in [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]:
        if file.name.startswith("test_"):
            continue
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, (ast.Attribute, ast.Name)):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
            owner = ast.unparse(call.func.value).split(".")[-1] if isinstance(call.func, ast.Attribute) else ""
            loads = name in ("from_pretrained", "from_config") and owner not in PLAIN
            loads |= (name == "pipeline" and owner in ("", "transformers")) or owner.startswith("AutoPeft")
            if loads and "trust_remote_code" not in {keyword.arg for keyword in call.keywords}:
                silent.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert silent == []


@pytest.fixture
def answers(monkeypatch) -> io.StringIO:
    """Somebody at the terminal, or a pipe, says yes to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    return sys.stdin


def plant(folder: Path, place: str, *, file: str = "config.json", **changes: object) -> Path:
    """Names code of its own in a folder's file; it leaves a mark when it runs."""
    read = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    target = [None, "own.Own"] if place == "AutoTokenizer" else "own.Own"
    (folder / file).write_text(json.dumps(read | changes | {"auto_map": {place: target}}))
    (folder / "own.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\nclass Own: pass\n")
    return folder


def test_no_answer_at_the_terminal_runs_a_models_code(tiny_folder, tmp_path, answers):
    for name in ("config", "tokenizer", "classifier"):
        shutil.copytree(tiny_folder, tmp_path / name)
    config = plant(tmp_path / "config", "AutoConfig", model_type="unheard_of")
    tokenizer = plant(
        tmp_path / "tokenizer", "AutoTokenizer", file="tokenizer_config.json", tokenizer_class="OwnTokenizer"
    )
    place, architectures = "AutoModelForSequenceClassification", ["OwnForSequenceClassification"]
    classifier = tmp_path / "classifier"
    (classifier / "config.json").write_text(json.dumps({"model_type": "mamba", "num_labels": 1}))
    plant(classifier, place, architectures=architectures, id2label={"0": "score"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(config)}))

    attempts = {
        "check": lambda: read_model(str(config)),
        "skeleton": lambda: skeleton(str(config)),
        "policy": lambda: load_policy(str(config), RLConfig(), dtype=None),
        "tokenizer": lambda: load_tokenizer(str(tokenizer)),
        "reward model": lambda: RewardModel(str(config)),
        "reward model's tokenizer": lambda: RewardModel(str(tokenizer)),
        "reward model's class": lambda: RewardModel(str(classifier)),
        "value model": lambda: scored_model(str(config), RLConfig(), load_tokenizer(str(tiny_folder))),
        "value model's class": lambda: scored_model(str(classifier), RLConfig(), load_tokenizer(str(tiny_folder))),
        "base of an adapter": lambda: merge(MergeSettings(output=str(tmp_path / "out"), adapter=str(adapter))),
        "evaluation": lambda: evaluate(
            EvaluationSettings(model=str(config), task="countdown", sampler="transformers")
        ),
    }
    refused = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            refused[name] = str(error)
    # A tokenizer.json needs no code beside it.
    assert {*attempts} - {*refused} == {"tokenizer", "reward model's tokenizer"} - {*refused}
    for name, message in refused.items():
        assert len(message.splitlines()) == 1, name
    assert len(answers.read()) == 2 * 99
    assert list(tmp_path.rglob("RAN")) == []
