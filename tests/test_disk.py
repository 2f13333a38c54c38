"""A disk that is full, read-only, limited or away: one message, nothing half written, and the run goes on later."""

import ctypes
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.embedded.policy import build_tokenizer
from common.evaluation.unfinished import Unfinished
from common.merge import MergeSettings, merge
from common.mistakes import CannotWrite
from common.rollouts import Completion
from common.runs import disk
from common.runs.checkpoints import list_checkpoints, make_room, save_checkpoint, write_file
from common.runs.disk import append, check_room, number_of, written
from common.runs.room import Sizes, warn_of_little_room
from common.runs.writable import check_folder
from tests.toy import metrics_of, samples_of, toy_config, toy_trainer

SETTINGS = {"num_steps": 3, "save_every": 1, "save_total_limit": 2}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with these options, or mounts it again with others; gives its folder."""
    place = tmp_path / "disk"
    place.mkdir()

    def with_options(options: str) -> Path:
        again = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "none", str(place)]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip(f"no file system can be mounted here: {done and done.stderr}")
        return place

    yield with_options
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # runs keep their locks


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Sets the largest size of a file for this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    toy_trainer(tiny_folder, folder, **SETTINGS).train()
    return folder


def size_of(folder: Path) -> int:
    """Bytes on a disk in pages of 4 kB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def check_nothing_is_half_written(folder: Path) -> None:
    assert not list(folder.rglob("*.tmp-*"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        assert not content or content.endswith(b"}\n")
    assert len(list_checkpoints(folder)) == len(list(folder.glob("checkpoint-*")))


def check_same(folder: Path, whole: Path) -> None:
    assert metrics_of(folder) == metrics_of(whole) and samples_of(folder) == samples_of(whole)
    weights = "final/model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


# Room for that many checkpoints and bytes; what could not be written, and what the message says else.
FULL = {
    "the next checkpoint, which is not begun": (
        1.5,
        0,
        "checkpoint-2",
        "are needed.*goes on from checkpoint-1, which",
    ),
    "a checkpoint that is larger than it seemed": (
        1,
        0,
        "checkpoint-1",
        "are free.*then begins the run again",
    ),
    "final": (1, 60_000, "final", "are needed.*goes on from checkpoint-3, which"),
    "a line of the log": (0, 16_384, "metrics.jsonl", "0 bytes are free"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_ends_a_run_in_one_message_and_it_goes_on_when_there_is_room(what, mount, whole, tiny_folder):
    number, more, name, said = FULL[what]
    saved = SETTINGS | ({"save_every": 3} if name == "final" else {})
    size = number * size_of(whole / "checkpoint-3") + more
    folder = mount(f"size={size // 1024:.0f}k") / "run"
    with pytest.raises(CannotWrite, match=said) as error:
        toy_trainer(tiny_folder, folder, **saved).train()
    assert str(error.value).startswith(f"{folder / name} could not be written: No space left on device: ")
    assert "\n" not in str(error.value)
    check_nothing_is_half_written(folder)
    mount("size=30m")
    toy_trainer(tiny_folder, folder, **saved).train()
    check_same(folder, whole)


@pytest.mark.slow
def test_old_checkpoints_make_room_where_the_user_allows_it(mount, whole, tiny_folder, caplog):
    folder = mount(f"size={(5 * size_of(whole / 'checkpoint-3') // 2) // 1024}k") / "run"
    with pytest.raises(CannotWrite, match=r"checkpoint-3 could .* Or pass --save_drop_oldest_first true, and older"):
        toy_trainer(tiny_folder, folder, **SETTINGS).train()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    caplog.set_level("INFO", "nanorlhf")
    toy_trainer(tiny_folder, folder, **SETTINGS, save_drop_oldest_first=True).train()
    assert "checkpoint-1 is dropped to make room for checkpoint-3" in caplog.text
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    check_same(folder, whole)


def checkpoint(folder: Path, step: int, size: int = 50_000) -> Path:
    return save_checkpoint(folder, step, writers={"model": lambda path: path.write_bytes(b"x" * size)}, state={})


def test_neither_the_latest_nor_the_best_makes_room_and_nothing_is_deleted_in_vain(mount):
    folder = mount("size=500k")
    for step in range(1, 6):
        checkpoint(folder, step)
    room = {"largest": 0, "best": "checkpoint-2", "drop_oldest": True}
    with pytest.raises(CannotWrite, match=r"About 400\.0 kB are needed"):
        make_room(folder, 6, needed=400_000, **room)
    assert len(list_checkpoints(folder)) == 5
    make_room(folder, 5, needed=400_000, **room)  # it is there already
    make_room(folder, 6, needed=300_000, **room)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    make_room(folder, 6, needed=370_000, **room)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-5"]


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_named_before_a_checkpoint_is_begun(limit, whole, tiny_folder, tmp_path):
    limit(200_000)  # the weights fit, and the optimizer does not
    with pytest.raises(CannotWrite, match=r"checkpoint-1 could.*File too large: a file may have 200\.0 kB at most"):
        toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS).train()
    limit(100_000)
    with pytest.raises(CannotWrite, match=r"final could.*File too large: a file may have 100\.0 kB at most"):
        toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS | {"save_every": 0}).train()
    check_nothing_is_half_written(tmp_path / "run")
    limit(10_000_000)
    toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS).train()
    check_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_on_a_disk_that_became_read_only_is_refused_before_it_loads_anything(mount, whole, tiny_folder):
    folder = mount("size=30m") / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("final"))
    mount("ro")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=f"output_dir={folder}: nothing can be written there: Read-only file system"):
        toy_trainer(tiny_folder, folder, **SETTINGS)
    for write in (lambda: append(folder / "metrics.jsonl", b"{}\n"), lambda: write_file(folder / "new", b"")):
        with pytest.raises(CannotWrite, match=r"Read-only file system.*Make the folder writable.*from checkpoint-3"):
            write()
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def as_any_user() -> Iterator[None]:
    """Root may read and write every file; without these capabilities, only as any other owner of it may."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, less = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    for place in (before, less):
        libc.capget(header, place)
    less[0] &= ~(1 << 1 | 1 << 2)  # of the effective ones: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, less)
    yield
    libc.capset(header, before)


@pytest.mark.slow
def test_what_a_user_may_not_read_of_a_run_is_one_message_and_it_goes_on_when_he_may(
    as_any_user, whole, tiny_folder, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("final", "checkpoint-3"))
    for name in ("config.yaml", "metrics.jsonl", "prompts.json", "samples.jsonl"):
        (folder / name).chmod(0)
        said = rf"{name} could not be read or written: Permission denied\..* Let this .* goes on from checkpoint-2"
        with pytest.raises(CannotWrite, match=said):
            toy_trainer(tiny_folder, folder, **SETTINGS).train()
        (folder / name).chmod(0o644)
    toy_trainer(tiny_folder, folder, **SETTINGS).train()
    check_same(folder, whole)


def test_a_folder_that_takes_no_byte_or_no_file_is_refused_and_says_what_is_free(mount):
    folder = mount("size=64k,nr_inodes=20")
    (folder / "all").write_bytes(b"x" * 65536)
    with pytest.raises(ValueError, match="No space left on device: 0 bytes are free"):
        check_folder(folder / "new")
    (folder / "all").unlink()
    for number in range(19):
        (folder / str(number)).touch()
    with pytest.raises(ValueError, match=r"No space left on device: .* are free, and room for 0 more files"):
        check_folder(folder / "new")
    assert not (folder / "new").exists()


def write_tensors(path: Path) -> None:
    with open(path, "wb") as file:
        torch.save({"weights": torch.zeros(100_000)}, file)


LIBRARIES = {
    "torch": write_tensors,
    "safetensors": lambda path: save_file({"weights": torch.zeros(100_000)}, path),
    "tokenizers": lambda path: build_tokenizer().save_pretrained(path),
    "python": lambda path: path.write_bytes(b"x" * 100_000),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_errors_of_every_library_that_writes_give_the_reason_of_the_system(library, mount, limit, tmp_path):
    folder = mount("size=8k")
    with pytest.raises(CannotWrite, match="No space left on device: "):
        written(folder / "file", lambda: LIBRARIES[library](folder / "file"))
    limit(1000)
    with pytest.raises(CannotWrite, match=r"File too large: a file may have 1\.0 kB at most \(ulimit -f\)"):
        written(tmp_path / "file", lambda: LIBRARIES[library](tmp_path / "file"))


def test_a_mistake_that_is_no_error_of_the_disk_stays_as_it_is(tmp_path):
    with pytest.raises(KeyError):
        written(tmp_path, lambda: {}["key"])
    assert number_of(ValueError("os error 28 without brackets")) is None


def test_a_line_that_does_not_fit_is_cut_back_and_the_lines_before_it_stay(mount, limit, tmp_path):
    for path in (mount("size=8k") / "lines", tmp_path / "lines"):
        append(path, b"x" * 4000 + b"\n")
        if path.parent == tmp_path:
            limit(6000)
        with pytest.raises(CannotWrite):
            append(path, b"y" * 9000 + b"\n")  # a part of it fits
        assert path.read_bytes() == b"x" * 4000 + b"\n"
        append(path, b"z\n")
        assert path.read_bytes()[4001:] == b"z\n"


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSES", (0, 0, 0))


def test_a_disk_that_is_away_for_a_moment_is_tried_again_and_no_line_is_there_twice(
    without_pauses, tmp_path, monkeypatch, caplog
):
    path, fsync, cut = tmp_path / "lines", os.fsync, os.ftruncate
    append(path, b"first\n")
    away = [errno.EIO, errno.ESTALE]

    def fail(descriptor: int) -> None:
        if away:  # the line is in the file already, and cannot be cut back
            monkeypatch.setattr(os, "ftruncate", lambda *args: fail(args[0]) if away else cut(*args))
            raise OSError(away.pop(), "away")
        monkeypatch.setattr(os, "ftruncate", cut)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    append(path, b"second\n")
    monkeypatch.undo()
    assert path.read_bytes() == b"first\nsecond\n"
    assert "tried again in" in caplog.text


def test_a_disk_that_stays_away_ends_in_the_message(without_pauses, tmp_path):
    tries = []

    def fail() -> None:
        tries.append(1)
        raise OSError(errno.EHOSTDOWN, "away")

    with pytest.raises(CannotWrite, match=r"Host is down\. .*It was tried 4 times\. See that the disk is there"):
        written(tmp_path / "file", fail)
    assert len(tries) == 4


def test_room_is_compared_with_what_the_file_system_says(tmp_path):
    check_room(tmp_path / "file", 1)
    with pytest.raises(CannotWrite, match=r"About 1000000000\.0 GB are needed"):
        check_room(tmp_path / "file", 10**18)


def test_a_run_whose_disk_will_be_full_says_so_at_its_start(mount, tiny_folder, caplog):
    folder = mount("size=2m")

    def said(**settings: object) -> str:
        caplog.clear()
        config = toy_config(tiny_folder, folder, **settings)
        sizes = Sizes(checkpoint=400_000, largest=1, final=200_000)
        warn_of_little_room(folder, sizes, config, first_step=1)
        return caplog.text

    assert not said(save_every=1, num_steps=9, save_total_limit=4)
    assert not said(save_every=2, num_steps=9, save_total_limit=9)
    for more in ({"save_total_limit": 5}, {"save_total_limit": 4, "eval_every": 1}):
        assert "2.1 MB are free, and this run needs about 2.4 MB more" in said(save_every=1, num_steps=9, **more)
    assert not said(save_every=0)


def test_what_an_evaluation_has_sampled_stands_on_a_full_disk(mount):
    folder = mount("size=8k")
    unfinished, completions = Unfinished(folder / "result.jsonl", {"seed": 1}), [Completion([1], [0.5], False)]
    with unfinished as kept, pytest.raises(CannotWrite, match=r"result\.jsonl could not be written: No space left"):
        for problem in range(1000):
            kept.add(problem, completions, ["a text"])
    content = unfinished.path.read_bytes()
    assert content.endswith(b"}\n") and len(content.splitlines()) == problem + 1
    mount("size=1m")
    with Unfinished(folder / "result.jsonl", {"seed": 1}) as kept:
        assert len(kept.completions) == problem


@pytest.mark.slow
def test_merging_onto_a_full_disk_leaves_nothing_behind(mount, tiny_folder, tmp_path):
    folder, sharded = mount("size=60k"), tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(sharded, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(sharded)
    with pytest.raises(CannotWrite, match="merged could not be written: No space left on device"):
        merge(MergeSettings(model=str(sharded), output=str(folder / "merged")))
    assert not list(folder.iterdir())
