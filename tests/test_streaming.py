"""Files that are written one tensor at a time have the bytes of those that save_pretrained writes."""

import pytest
import torch
import transformers
from safetensors.torch import save_file

from common.embedded.policy import build_tokenizer
from common.logprobs import without_adapter
from common.models.saving import save_model, save_weights, stream_weights
from common.models.streaming import write_weights
from common.models.weights import policy_weights, weights_layout
from tests.layouts import CONFIGS, small_model, with_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]

WEIGHTS = "model.safetensors"


def some_tensors() -> dict[str, torch.Tensor]:
    """Of several types and shapes, two of them views."""
    numbers = torch.arange(24.0).view(4, 6)
    return {
        "z": numbers[:2],
        "a.ä": numbers.t(),
        "half": torch.randn(3, 5).bfloat16(),
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 7),
        "count": torch.tensor([2**40]),
        "mask": torch.tensor([True, False, True]),
    }


def test_a_file_has_the_bytes_of_safetensors_in_whatever_order_tensors_come(tmp_path):
    tensors = some_tensors()
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "x", metadata={"format": "pt"})
    write_weights(reversed([*tensors.items()]), tensors, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "x").read_bytes()


def test_two_processes_write_the_files_that_one_would(tiny_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    layout = weights_layout(model)
    save_weights(model, dict(policy_weights(model)), tmp_path / "one", max_shard_size=40_000)
    (tmp_path / "two").mkdir()
    for process in (1, 0):
        options = {"max_file_size": 40_000, "process": process, "num_processes": 2}
        write_weights(policy_weights(model), layout, tmp_path / "two", **options)
        written = len([*(tmp_path / "two").glob("*.safetensors")])
    files = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert written > 2 and "model.safetensors.index.json" in files
    assert files == {name: (tmp_path / "one" / name).read_bytes() for name in files}
    assert len(files) == len([*(tmp_path / "one").glob("model*")])


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "kimi_linear"])  # its kernels need a GPU
@pytest.mark.parametrize("lora", [False, True])
def test_a_streamed_model_is_the_saved_one(kind, lora, tmp_path):
    model = small_model(kind)
    policy = with_lora(model) if lora else model
    save_model(policy, build_tokenizer(), tmp_path / "saved")
    plain = without_adapter(policy)
    stream_weights(plain, policy_weights(policy), weights_layout(policy), tmp_path / "streamed")
    for path in (tmp_path / "streamed").iterdir():
        assert path.read_bytes() == (tmp_path / "saved" / path.name).read_bytes(), path.name
    assert {WEIGHTS, "config.json"} <= {path.name for path in (tmp_path / "streamed").iterdir()}


def test_where_the_disk_takes_nothing_the_others_are_not_left_waiting(tmp_path):
    (tmp_path / WEIGHTS).write_text("in the way of the file, and of a folder")
    model = small_model("mixtral")
    layout = weights_layout(model)
    for folder in (tmp_path, tmp_path / WEIGHTS / "policy"):
        taken = []
        weights = ((name, taken.append(name) or each) for name, each in policy_weights(model))
        with pytest.raises((FileExistsError, NotADirectoryError)):
            stream_weights(model, weights, layout, folder)
        assert taken == [*layout]
