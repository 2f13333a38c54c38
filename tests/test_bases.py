"""Adapters name their base so that no path of this machine is shared, and our commands find it again."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.config import RLConfig
from common.embedded import load_tokenizer
from common.merge import MergeSettings, find_source, merge
from common.models.bases import base_from_here, find_base
from common.models.loading import load_policy
from common.models.saving import save_model

LORA = RLConfig(use_lora=True, lora_r=4)


@pytest.fixture
def tree(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A working directory with a base, and a run whose final/ was trained on it."""
    place = tmp_path / "place"
    shutil.copytree(tiny_folder, place / "models" / "base")
    monkeypatch.chdir(place)
    policy = load_policy(str(place / "models" / "base"), LORA, dtype=torch.float32)
    run = place / "runs" / "x"
    policy.save_pretrained(run / "checkpoint-1" / "policy")
    save_model(policy, load_tokenizer("models/base"), run / "final")
    (run / "config.yaml").write_text("model: models/base\n")
    return place


def recorded(adapter: Path) -> str:
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_nothing_that_is_shared_names_a_path_of_this_machine(tree):
    final, policy = tree / "runs/x/final", tree / "runs/x/checkpoint-1/policy"
    assert (recorded(final / "adapter"), recorded(policy)) == ("../../../../models/base", "./models/base")
    files = [path for folder in (final, policy) for path in folder.rglob("*") if path.suffix in (".json", ".md")]
    assert len(files) > 5
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert str(tree) not in text and "is_local" not in text and "local_files_only" not in text
    assert "base_model: ../../../../models/base\n" in (final / "adapter" / "README.md").read_text()


def test_the_base_is_found_from_anywhere_and_after_everything_has_moved(tree, tmp_path, monkeypatch):
    moved = tree.rename(tmp_path / "moved")
    monkeypatch.chdir(moved / "runs")
    for adapter in ("x/final/adapter", "x/checkpoint-1/policy"):
        source = find_source(None, adapter)
        assert Path(source.base) == moved / "models" / "base"
    merge(MergeSettings(output="whole", adapter="x/final/adapter"))
    merged, saved = (load_file(Path(folder) / "model.safetensors") for folder in ("whole", "x/final"))
    assert merged.keys() == saved.keys() and all(torch.equal(merged[name], saved[name]) for name in saved)
    assert "is_local" not in Path("whole/tokenizer_config.json").read_text()


def test_an_adapter_from_before_and_one_whose_base_has_moved_are_merged_too(tree, tmp_path, monkeypatch):
    adapter = Path("runs/x/final/adapter")
    config = adapter / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"base_model_name_or_path": str(tree / "models" / "base")}))
    assert find_source(None, str(adapter)).base == str(tree / "models" / "base")
    config.write_text(json.dumps(settings | {"base_model_name_or_path": "/gone/base"}))
    assert find_source(None, str(adapter)).base == "models/base"  # as the run's config.yaml has it
    Path("models/base").rename("elsewhere")
    with pytest.raises(ValueError, match=r"model='/gone/base': cannot be loaded.*Pass --model"):
        merge(MergeSettings(output="whole", adapter=str(adapter)))
    merge(MergeSettings(output="whole", adapter=str(adapter), model="elsewhere"))
    assert Path("whole/model.safetensors").is_file()


def test_a_resumed_adapter_names_the_base_that_it_was_loaded_with(tree, monkeypatch):
    policy = tree / "runs/x/checkpoint-1/policy"
    config = policy / "adapter_config.json"
    config.write_text(config.read_text().replace("./models/base", "/machine/models/base"))
    load_policy("models/base", LORA, dtype=torch.float32, checkpoint=policy).save_pretrained("again")
    assert recorded(Path("again")) == "./models/base"


def test_a_hub_id_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_from_here("Qwen/Qwen3-0.6B") == find_base(tmp_path, "Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    (tmp_path / "link").symlink_to(tmp_path)
    assert base_from_here("link") == f".{os.sep}."
