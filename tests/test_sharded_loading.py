"""Two processes read a model in parts, and push it together: nothing differs from one process with the whole of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.embedded.policy import build_tokenizer
from PPO.value_model import load_value_model, save_value_model
from tests.layouts import small_model
from tests.sharded_loading import ADAPTED
from tests.toy import save_toy_policy, toy_config

ROOT = Path(__file__).parent.parent
# Names in memory are others than in the checkpoint, tensors are fused or split, parts belong to images, ties.
KINDS = ["mixtral", "gpt_neox", "hrm_text", "gemma3", "gpt2"]
VARIANTS = ["qwen2", "several files", "odd rows", "bfloat16 file", "bin", "bin of torch 1.5", "tied twice"]
BAD = {"NaN": "1 weight is NaN or infinite", "missing": "1 weight is missing", "more": "holds a weight for which"}
BAD |= {"shape": "1 weight has another shape"}


# MiB that modules and parameters of a small model take beside their numbers.
OBJECTS = 2


def rewritten(folder: Path, change) -> None:
    """Change the tensors in a folder's file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def make_models(folder: Path) -> None:
    """A folder `kind ...` for each model that loads, and `bad ...` for each that is refused."""
    for kind in KINDS:
        small_model(kind).save_pretrained(folder / f"kind {kind}")
    plain = save_toy_policy(folder / "kind qwen2")
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.save_pretrained(folder / "kind several files", max_shard_size="40KB")
    assert len(list((folder / "kind several files").glob("*.safetensors"))) > 2
    model.to(torch.bfloat16).save_pretrained(folder / "kind bfloat16 file")
    save_toy_policy(folder / "kind odd rows", hidden_size=36, intermediate_size=33, num_attention_heads=2)
    for name in ("bin", "bin of torch 1.5", "tied twice"):
        shutil.copytree(plain, folder / f"kind {name}")
    rewritten(folder / "kind tied twice", lambda tensors: tensors.update({"lm_head.weight": embeddings(tensors)}))
    tensors = load_file(plain / "model.safetensors")
    for name, is_zip in (("bin", True), ("bin of torch 1.5", False)):
        (folder / f"kind {name}" / "model.safetensors").unlink()
        file = folder / f"kind {name}" / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=is_zip)
    cached = folder / "hub" / "models--someone--tiny"
    shutil.copytree(plain, cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    for name in BAD:
        shutil.copytree(plain, folder / f"bad {name}")
    norm = "model.layers.1.mlp.down_proj.weight"
    rewritten(folder / "bad NaN", lambda tensors: tensors[norm][-1].fill_(torch.nan))  # rows of the second process
    rewritten(folder / "bad missing", lambda tensors: tensors.pop(norm))
    rewritten(folder / "bad more", lambda tensors: tensors.update({f"{norm}.more": torch.ones(2)}))
    rewritten(folder / "bad shape", lambda tensors: tensors.update({norm: torch.ones(3, 3)}))
    config = toy_config(plain, folder, algorithm="PPO")
    value_model = load_value_model(str(plain), config, dtype=torch.float32, zero_head=False)
    save_value_model(value_model, build_tokenizer(), folder / "scored")


def embeddings(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["model.embed_tokens.weight"].clone()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What both processes found, by case, and how the launcher ended."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(folder / "hub")}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once, so that peaks are seen
    start = monotonic()
    done = subprocess.run(
        [*command, "-m", "tests.sharded_loading", str(folder), str(folder / "found.json")],
        cwd=ROOT,
        env=os.environ | environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (folder / "found.json").exists(), done.stderr[-6000:]
    ended = {"rc": done.returncode, "stderr": done.stderr, "seconds": monotonic() - start}
    return json.loads((folder / "found.json").read_text()) | {"ended": ended}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *VARIANTS, *(f"{kind}, adapter" for kind in ADAPTED)])
def test_what_two_processes_read_and_push_in_parts_is_what_one_reads_and_pushes(found, kind):
    assert found[f"kind {kind}"] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bfloat16", "hub id", "pieces", "value models"])
def test_so_are_bases_in_bfloat16_models_of_the_hub_large_tensors_value_models_and_references(found, case):
    assert found[case] == [[], []]


@pytest.mark.slow
def test_a_file_that_cannot_be_read_in_parts_is_said_to_be_read_whole(found):
    said = [line for line in found["ended"]["stderr"].splitlines() if "in the format of torch before 1.6" in line]
    assert len(said) == 1 and "bin of torch 1.5" in said[0]  # the main process says it


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_both_processes_refuse_a_model_that_one_process_refuses(found, name):
    messages = found[f"bad {name}"]
    assert messages[0] == messages[1] and messages[0].startswith("ValueError: model=") and BAD[name] in messages[0]


@pytest.mark.slow
def test_a_push_has_at_most_two_whole_tensors_at_a_time(found):
    assert found["alive"] == [2, 2]


@pytest.mark.slow
def test_a_process_whose_sampler_does_not_take_a_push_ends_all_with_a_message(found):
    first, second = found["push fails: second"]
    assert second == "RuntimeError: no room for it"
    assert first.startswith(
        "ValueError: push of the policy's weights: the sampler of process 1 (RuntimeError: no room"
    )
    assert found["push fails: both"] == ["WrongNumbers: NaN"] * 2
    assert found["push fails: leaves early"] == ["", ""]
    main, other = found["push fails: server"]
    assert main == other and main.startswith("ServerFailed: push of the policy's weights: the main process could not")


@pytest.mark.slow
def test_no_process_has_more_than_its_share_of_a_model_and_two_tensors(found):
    for memory in found["memory"]:
        assert memory["model"] > 40 and memory["largest"] < 5
        assert memory["loading"] >= memory["loaded"] > 0.9 * memory["model"] / 2  # it is measured
        assert memory["loading"] <= memory["model"] / 2 + memory["largest"]
        assert memory["pushing"] <= memory["bound"] + OBJECTS


@pytest.mark.slow
def test_a_process_that_cannot_go_on_in_a_push_ends_and_the_other_does_not_wait(found):
    assert found["ended"]["rc"] != 0
    assert "RuntimeError: out of memory while a weight is made" in found["ended"]["stderr"]
