"""Checkpoints of models that are spread over processes: complete or absent, and read by any number of processes."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from common.merge import MergeSettings, merge
from common.runs.checkpoints import find_whole_checkpoint, list_checkpoints, load_state
from common.runs.parts import PARTS_FOLDER, read_description
from common.runs.sources import find_model
from tests.forked import launch
from tests.own_copy import use_own_copies
from tests.sharded_runs import NUM_STEPS, STEP, copy_until, trainer_of
from tests.toy import metrics_of, save_toy_policy


def start(num_processes: int, model: Path, folder: Path, *names: str) -> None:
    """Do this in so many processes, and see that all of them end well."""
    launch(num_processes, ["-m", "tests.sharded_runs", model, folder, *names])


@pytest.fixture(scope="module")
def runs(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of one, two and three processes, and what those that continue them have written."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = ("grpo", "lora", "ppo", "host")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_own_copies(monkeypatch)
        for kind in ("grpo", "lora", "ppo"):
            trainer_of(toy_folder, folder / f"{kind} whole", kind, shard="none").train()
            copy_until(folder / f"{kind} whole", folder / f"{kind} from one")
        two = [f"{verb}:{kind}" for kind in kinds for verb in ("whole", "again")]
        start(2, toy_folder, folder, *two, "rest:grpo from one", "rest:ppo from one", "full_disk", "stopped")
        start(3, toy_folder, folder, *(f"again:{kind}" for kind in kinds))
        for kind in kinds:
            copy_until(folder / kind, folder / f"{kind} on 1")
            shard = "none" if kind == "grpo" else "full"  # alone, both keep models whole
            trainer_of(toy_folder, folder / f"{kind} on 1", kind, shard=shard).train()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "lora", "ppo", "host"])
def test_a_run_of_two_goes_on_alone_on_two_and_on_three(runs, kind):
    expected = metrics_of(runs / kind)
    assert metrics_of(runs / f"{kind} on 2") == expected
    for num in (1, 3):
        lines = metrics_of(runs / f"{kind} on {num}")
        for name in ("policy/loss", "policy/grad_norm", "value/loss", "score"):
            if name in expected[-1]:
                assert lines[-1][name] == pytest.approx(expected[-1][name], abs=1e-6), (num, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_of_one_goes_on_with_shards(runs, kind):
    expected, lines = metrics_of(runs / f"{kind} whole"), metrics_of(runs / f"{kind} from one")
    assert len(lines) == len(expected) and read_description(runs / f"{kind} from one/checkpoint-{NUM_STEPS}")
    assert lines[-1]["policy/loss"] == pytest.approx(expected[-1]["policy/loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "folder"), [("grpo", "final"), ("lora", "final"), ("ppo", "final"), ("ppo", "final/value_model")]
)
def test_the_final_model_has_the_files_of_an_unsharded_run(runs, kind, folder):
    spread, alone = (runs / name / folder for name in (kind, f"{kind} whole"))
    names = {str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file()}
    assert {str(path.relative_to(spread)) for path in spread.rglob("*") if path.is_file()} == names
    for name in names - {"manifest.json"}:
        if name.endswith(".safetensors"):  # trained with other rounding
            assert header(spread / name) == header(alone / name)
            for tensor, expected in load_file(alone / name).items():
                torch.testing.assert_close(load_file(spread / name)[tensor], expected, atol=1e-4, rtol=0)
        else:
            assert (spread / name).read_bytes() == (alone / name).read_bytes(), name


def header(file: Path) -> bytes:
    """What a file of tensors says of them: names, types, shapes, places."""
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.slow
def test_the_policy_of_a_checkpoint_is_loaded_as_any_and_merged_into_the_final_model(runs, tmp_path):
    checkpoint, final = runs / f"grpo/checkpoint-{NUM_STEPS}", runs / "grpo/final"
    assert (
        len([*(checkpoint / "policy").glob("*.safetensors")]) > 1 and read_description(checkpoint).num_processes == 2
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint / "policy").state_dict()
    for name, tensor in load_file(final / "model.safetensors").items():
        assert torch.equal(loaded[name], tensor)
    merge(MergeSettings(model=str(checkpoint), output=str(tmp_path / "merged")))
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (final / name).read_bytes(), name
    assert find_model(str(checkpoint)).base == str(checkpoint / "policy")
    (tmp_path / "best").symlink_to(checkpoint / "policy")
    assert find_model(str(tmp_path / "best")).base == str(tmp_path / "best")


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_ends_all_and_leaves_nothing(runs):
    own, other = ((runs / f"full disk {process}.txt").read_text() for process in (1, 0))
    assert own.startswith(f"{runs / 'full disk/checkpoint-1'} could not be written: File too large")
    assert other.startswith(f"{runs / 'full disk/checkpoint-1'} could not be written: File too large")
    assert not [path.name for path in (runs / "full disk").iterdir() if path.name.startswith("checkpoint")]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_with_a_checkpoint_of_the_last_whole_step(runs):
    [checkpoint] = list_checkpoints(runs / "stopped")
    assert load_state(checkpoint)["step"] == 1 and not (runs / "stopped/final").exists()
    assert len(metrics_of(runs / "stopped")) == 2


@pytest.fixture
def copied(runs, tmp_path) -> Path:
    """A copy of the run of two as it was after STEP."""
    copy_until(runs / "grpo", tmp_path / "grpo")
    return tmp_path / "grpo"


@pytest.mark.slow
def test_a_damaged_part_is_found_before_the_run_goes_on(copied):
    [part, _] = sorted((copied / f"checkpoint-{STEP}" / PARTS_FOLDER).glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    checkpoint, damaged = find_whole_checkpoint(copied)
    assert checkpoint is None or checkpoint.name < f"checkpoint-{STEP}"
    assert damaged == {f"checkpoint-{STEP}": f"parts/{part.name} has other contents than were saved"}


@pytest.mark.slow
def test_parts_of_another_model_or_another_layout_are_refused_before_anything_is_loaded(
    copied, toy_folder, tmp_path, monkeypatch
):
    use_own_copies(monkeypatch)
    other = save_toy_policy(tmp_path / "other", hidden_size=48)
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(toy_folder), str(other)))
    monkeypatch.setattr("common.trainer.OnPolicyTrainer._load_models", None)
    with pytest.raises(ValueError, match=r"policy's model.embed_tokens.weight with the shape \[\d+, 32\], and model="):
        trainer_of(other, copied, "grpo")
    shutil.copytree(copied, tmp_path / "later")
    description = tmp_path / f"later/checkpoint-{STEP}" / PARTS_FOLDER / "parts.json"
    description.write_text(description.read_text().replace('"layout": 1', '"layout": 2'))
    with pytest.raises(ValueError, match="layout 2, and this version of nanoRLHF reads layout 1"):
        read_description(tmp_path / f"later/checkpoint-{STEP}")
