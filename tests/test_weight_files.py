"""The names in a checkpoint, and files of it that are damaged or missing."""

import os
import pickle

import pytest
import torch

from common.models.weight_files import check_weight_files, shards, weight_names
from common.models.weights import checkpoint_shapes
from tests.layouts import small_model


def test_the_names_of_a_checkpoint_are_read_from_whatever_files_it_has(tmp_path):
    model = small_model("gpt2")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    model.config.save_pretrained(tmp_path / "pickled")
    model.config.save_pretrained(tmp_path / "none")
    one = weight_names(tmp_path / "one")
    torch.save({name: torch.zeros(1) for name in one}, tmp_path / "pickled" / "pytorch_model.bin")
    assert len(one) == 28 and len(shards(tmp_path / "many")) > 3
    assert one == weight_names(tmp_path / "many") == weight_names(tmp_path / "pickled")
    assert weight_names(tmp_path / "none") is None
    assert checkpoint_shapes(str(tmp_path / "none")).keys() == set(one)  # from the configuration alone
    for name in ("one", "many", "pickled", "none"):
        check_weight_files(tmp_path / name)
    check_weight_files("Qwen/Qwen2.5-0.5B")


@pytest.mark.parametrize(
    ("size", "file"), [("20KB", "model-00002-of"), ("1GB", "model.safetensors"), ("20KB", "model.safetensors.index")]
)
def test_a_file_that_is_cut_off_is_named(size, file, tmp_path):
    small_model("gpt2").save_pretrained(tmp_path, max_shard_size=size)
    path = next(tmp_path.glob(f"{file}*"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        ValueError, match=rf"{path.name} is damaged \([\d,]+ bytes; .*Download or write this file again"
    ):
        check_weight_files(tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path):
    small_model("gpt2").save_pretrained(tmp_path, max_shard_size="20KB")
    path = next(tmp_path.glob("model-00002-of*"))
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is missing, which model.safetensors.index.json lists"):
        check_weight_files(tmp_path)


class _Calls:
    """What a hostile file brings: a call that a plain unpickler would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_calls_something_is_refused_in_our_words_and_not_executed(zipped, tmp_path):
    mark = tmp_path / "executed"
    content = {"a": torch.zeros(1), "b": _Calls(os.system, f"touch {mark}")}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin holds more than weights, such as \w+.system, so"
    ) as caught:
        check_weight_files(tmp_path)
    assert not any(word in str(caught.value) for word in ("damaged", "weights_only", "torch.load"))
    assert not mark.exists()


def test_a_pickle_of_another_protocol_is_refused_in_our_words(tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Calls(os.system, f"touch {mark}"), protocol=4))
    with pytest.raises(ValueError, match="is no file of weights, or holds more than weights, so it is not read"):
        check_weight_files(tmp_path)
    assert not mark.exists()
