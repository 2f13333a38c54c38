"""A run whose folder was damaged: the newest whole checkpoint is used, and what is wrong is said in one message."""

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.runs.checkpoints import damage_of, list_checkpoints, load_state
from common.runs.manifest import DAMAGE_FILE, MANIFEST_FILE, write_manifest
from common.start import report
from tests.forked import launch
from tests.toy import (
    LORA,
    algorithms,
    metrics_of,
    toy_trainer,
    train_until,
)

# A run of five steps with a checkpoint after each, killed after the third.
SETTINGS = {"num_steps": 5, "save_every": 1, "eval_every": 1, "save_total_limit": 5}
WEIGHTS, OPTIMIZER, STATE = "policy/model.safetensors", "policy_optimizer.pt", "trainer_state.json"
ADAPTER, ADAPTER_CONFIG = "policy/adapter_model.safetensors", "policy/adapter_config.json"


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Folders of a killed run and of the same run without interruption, by algorithm; made once."""

    @cache
    def make(algorithm: str = "GRPO", lora: bool = False) -> tuple[Path, Path]:
        parent = tmp_path_factory.mktemp(algorithm)
        settings = SETTINGS | {"algorithm": algorithm} | (LORA if lora else {})
        train_until(toy_trainer(tiny_folder, parent / "killed", **settings), 3)
        toy_trainer(tiny_folder, parent / "whole", **settings).train()
        return parent / "killed", parent / "whole"

    return make


def delete(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def write(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(change((checkpoint / name).read_bytes()))


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def link_to_nothing(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to("nowhere")


def replace_by_the_one_before(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("checkpoint-2"), checkpoint)


DAMAGES = {
    "no weights": (delete(WEIGHTS), f"{WEIGHTS} is missing"),
    "no policy": (delete("policy"), "policy/.* is missing"),
    "no optimizer": (delete(OPTIMIZER), f"{OPTIMIZER} is missing"),
    "no state": (delete(STATE), f"{STATE} is missing"),
    "empty state": (write(STATE, lambda content: b""), rf"{STATE} has 0 bytes instead of \d+"),
    "weights cut off": (write(WEIGHTS, lambda content: content[:5000]), rf"{WEIGHTS} has 5,000 bytes instead of"),
    "weights of the same size": (write(WEIGHTS, flip_last_byte), f"{WEIGHTS} has other contents than were saved"),
    "optimizer cut off": (write(OPTIMIZER, lambda content: b"PK\x03\x04abc"), f"{OPTIMIZER} has 7 bytes instead of"),
    "empty optimizer": (write(OPTIMIZER, lambda content: b""), f"{OPTIMIZER} has 0 bytes instead of"),
    "spoiled manifest": (write(MANIFEST_FILE, lambda content: b"[1]"), f"{MANIFEST_FILE} is not readable"),
    "nothing in it": (empty, f"{STATE} is missing"),
    "link to nothing": (link_to_nothing, "it is a link to nothing"),
    "another step's": (replace_by_the_one_before, f"{STATE} is that of step 2"),
}
OF_LORA = {
    "no adapter": (delete(ADAPTER), f"{ADAPTER} is missing"),
    "other alpha": (
        write(ADAPTER_CONFIG, lambda content: content.replace(b'"lora_alpha": 64', b'"lora_alpha": 65')),
        f"{ADAPTER_CONFIG} has other contents",
    ),
}
OF_PPO = {
    "no value model": (delete("value.safetensors"), "value.safetensors is missing"),
    "value model cut off": (write("value.safetensors", lambda content: content[:999]), "value.safetensors has 999"),
    "no value optimizer": (delete("value_optimizer.pt"), "value_optimizer.pt is missing"),
}
CASES = [
    *(("GRPO", False, name, *case) for name, case in DAMAGES.items()),
    *((name, False, "no weights", *DAMAGES["no weights"]) for name in algorithms() if name != "GRPO"),
    *(("GRPO", True, name, *case) for name, case in OF_LORA.items()),
    *(("PPO", False, name, *case) for name, case in OF_PPO.items()),
]


@pytest.mark.parametrize(
    ("algorithm", "lora", "damage", "message"),
    [
        pytest.param(
            *(algorithm, lora, damage, message),
            marks=[] if algorithm == "GRPO" and not lora else pytest.mark.slow,
            id=f"{algorithm} {name}",
        )
        for algorithm, lora, name, damage, message in CASES
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_run_is_the_same(
    runs, tiny_folder, tmp_path, caplog, algorithm, lora, damage, message
):
    killed, whole = runs(algorithm, lora)
    run = shutil.copytree(killed, tmp_path / "run", symlinks=True)
    damage(run / "checkpoint-3")
    trainer = toy_trainer(tiny_folder, run, **SETTINGS, algorithm=algorithm, **(LORA if lora else {}))
    warnings = [record.getMessage() for record in caplog.records if "damaged checkpoints" in record.getMessage()]
    assert len(warnings) == 1 and "continues from checkpoint-2" in warnings[0]
    assert re.search(rf"checkpoint-3: {message}", warnings[0])
    assert trainer.run.first_step == 3
    trainer.train()
    assert metrics_of(run) == metrics_of(whole)
    assert [path.name for path in list_checkpoints(run)] == [f"checkpoint-{step}" for step in range(1, 6)]
    assert all(damage_of(path, read="") is None for path in list_checkpoints(run))
    stored, expected = (load_state(path / "checkpoint-3") for path in (run, whole))
    assert stored == expected


def killed_run(runs, tmp_path: Path, **options) -> Path:
    """A copy of the killed run, to damage."""
    return shutil.copytree(runs(**options)[0], tmp_path / "run", symlinks=True)


def continued(model: Path, run: Path, **settings):
    return toy_trainer(model, run, **(SETTINGS | settings))


@pytest.fixture
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused must be refused before that."""

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("common.trainer.load_policy", fail)


# Which checkpoint


def test_several_damaged_checkpoints_are_named_in_one_message(runs, tiny_folder, tmp_path, caplog):
    run = killed_run(runs, tmp_path)
    (run / "checkpoint-3" / WEIGHTS).unlink()
    write(OPTIMIZER, flip_last_byte)(run / "checkpoint-2")
    assert continued(tiny_folder, run).run.first_step == 2
    (message,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert f"checkpoint-3: {WEIGHTS} is missing; checkpoint-2: {OPTIMIZER} has other contents" in message
    assert "continues from checkpoint-1" in message and message.count("\n") < 8


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_run_none_of_whose_checkpoints_is_whole_is_refused_and_left_as_it_is(runs, tiny_folder, tmp_path):
    run = killed_run(runs, tmp_path)
    for step, name in enumerate((WEIGHTS, OPTIMIZER, STATE), start=1):
        (run / f"checkpoint-{step}" / name).unlink()
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=r"none of its checkpoints is whole\. checkpoint-3: .* is missing") as refused:
        continued(tiny_folder, run)
    message = str(refused.value)
    assert all(name in message for name in (WEIGHTS, OPTIMIZER, STATE, f"delete {run}", "another --output_dir"))
    assert sorted(run.rglob("*")) == before and len(metrics_of(run)) == 4


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_run_whose_checkpoints_are_gone_does_not_lose_its_metrics_too(runs, tiny_folder, tmp_path):
    run = killed_run(runs, tmp_path)
    for checkpoint in list_checkpoints(run):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match=r"its checkpoints are gone \(step 3\).*another --output_dir"):
        continued(tiny_folder, run)
    assert len(metrics_of(run)) == 4


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tiny_folder, tmp_path, capsys):
    train_until(toy_trainer(tiny_folder, tmp_path / "run", num_steps=3, save_every=2), 1)
    report(toy_trainer(tiny_folder, tmp_path / "run", num_steps=3, save_every=2))
    assert "begun again, since it had no checkpoint yet" in capsys.readouterr().out
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("damage", [None, "weights", "policy"])
def test_a_checkpoint_from_before_there_were_manifests_is_used_if_it_can_be_read(runs, tiny_folder, tmp_path, damage):
    run = killed_run(runs, tmp_path)
    for checkpoint in list_checkpoints(run):
        (checkpoint / MANIFEST_FILE).unlink()
    if damage == "weights":
        write(WEIGHTS, lambda content: content[:-8])(run / "checkpoint-3")
    if damage == "policy":
        shutil.rmtree(run / "checkpoint-3" / "policy")
    trainer = continued(tiny_folder, run)
    assert trainer.run.first_step == (3 if damage else 4)
    trainer.train()
    assert metrics_of(run) == metrics_of(runs()[1])


def test_a_checkpoint_can_be_a_link_which_rotation_removes_and_not_what_it_points_to(runs, tiny_folder, tmp_path):
    run = killed_run(runs, tmp_path)
    shutil.move(run / "checkpoint-3", tmp_path / "elsewhere")
    (run / "checkpoint-3").symlink_to(tmp_path / "elsewhere")
    trainer = continued(tiny_folder, run, save_total_limit=1)
    assert trainer.run.first_step == 4
    trainer.run.best = None
    trainer.train()
    assert not (run / "checkpoint-3").is_symlink() and (tmp_path / "elsewhere" / STATE).is_file()


def test_a_damaged_checkpoint_does_not_count_as_kept_even_if_only_its_contents_tell(runs, tiny_folder, tmp_path):
    run = killed_run(runs, tmp_path)
    write(WEIGHTS, flip_last_byte)(run / "checkpoint-3")
    settings = {"save_every": 2, "save_total_limit": 2, "eval_every": 1}
    trainer = continued(tiny_folder, run, **settings)
    trainer.run.best = {"checkpoint": "checkpoint-0", "metric": "eval/accuracy", "value": 9.0}  # nothing is better
    assert (run / "checkpoint-3" / DAMAGE_FILE).read_text().startswith(f"{WEIGHTS} has other contents")
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    trainer.train()  # saves only the fourth
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


TWO_PROCESSES = """
import sys
from pathlib import Path
import common
from tests.toy import toy_trainer
from tests.test_resume import SETTINGS
trainer = toy_trainer(Path(sys.argv[1]), Path(sys.argv[2]), **SETTINGS)
process, run = trainer.accelerator.process_index, trainer.run
print(f"process {process}: {run.checkpoint.name}, {run.first_step}, {run.best['checkpoint']}", flush=True)
trainer.train()
trainer.accelerator.state.destroy_process_group()
"""


@pytest.mark.slow
def test_all_processes_continue_from_the_checkpoint_that_the_main_one_chose(runs, tiny_folder, tmp_path):
    run = killed_run(runs, tmp_path)
    write(WEIGHTS, flip_last_byte)(run / "checkpoint-3")
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    done = launch(2, [tmp_path / "two.py", tiny_folder, run])
    best = load_state(run / "checkpoint-2")["best"]["checkpoint"]
    assert [each.stdout for each in done] == [f"process {each}: checkpoint-2, 3, {best}\n" for each in (0, 1)]
    assert [each.stderr.count("damaged checkpoints") for each in done] == [1, 0]
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2, 3, 4, 5]


def test_a_checkpoint_that_was_repaired_is_used_again(runs, tiny_folder, tmp_path):
    run = killed_run(runs, tmp_path)
    write(WEIGHTS, flip_last_byte)(run / "checkpoint-3")
    assert continued(tiny_folder, run).run.first_step == 3
    write(WEIGHTS, flip_last_byte)(run / "checkpoint-3")
    assert continued(tiny_folder, run).run.first_step == 4
    assert not (run / "checkpoint-3" / DAMAGE_FILE).exists()


def test_other_folders_with_a_similar_name_are_left_alone(runs, tiny_folder, tmp_path, caplog):
    run = killed_run(runs, tmp_path)
    for name in ("checkpoint-old", "checkpoint-1b", "notes"):
        (run / name).mkdir()
    (run / ".DS_Store").write_text("x")
    (run / "checkpoint-3" / ".DS_Store").write_text("x")
    assert continued(tiny_folder, run).run.first_step == 4
    assert "damaged" not in caplog.text


# What else is in the folder


@pytest.mark.parametrize("content", [None, b'\xff\xfe\n[1]\n{}\n5\n"x"\n{"step": "2"}\n\x00\x00'])
def test_metrics_of_which_an_old_checkpoint_has_no_copy_are_said_to_be_missing(
    runs, tiny_folder, tmp_path, caplog, content
):
    run = killed_run(runs, tmp_path)
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_bytes(content)
    (run / "checkpoint-3" / "metrics.jsonl").unlink()
    write_manifest(run / "checkpoint-3")
    continued(tiny_folder, run).train()
    assert "metrics.jsonl has no line of 3 of the 3 steps before the checkpoint" in caplog.text
    assert metrics_of(run) == metrics_of(runs()[1])[4:]


@pytest.mark.parametrize("damage", ["empty", "no weights"])
def test_a_final_folder_that_is_not_whole_is_written_again(runs, tiny_folder, tmp_path, caplog, damage):
    run = shutil.copytree(runs()[1], tmp_path / "run", symlinks=True)
    if damage == "empty":
        shutil.rmtree(run / "final")
        (run / "final").mkdir()
    else:
        (run / "final" / "model.safetensors").unlink()
    continued(tiny_folder, run).train()
    assert "final is damaged" in caplog.text and damage_of(run / "final", read="") is None
    before = load_file(runs()[1] / "final" / "model.safetensors")
    after = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_final_folder_that_was_edited_is_not_overwritten(runs, tiny_folder, tmp_path):
    run = shutil.copytree(runs()[1], tmp_path / "run", symlinks=True)
    edited = run / "final" / "generation_config.json"
    edited.write_text(edited.read_text().replace("{", '{"top_k": 5, ', 1))
    before = edited.read_text()
    for steps in ({}, {"num_steps": 9}):
        with pytest.raises(ValueError, match=r"final/ is not as it was written: generation_config.json has .* Delete"):
            continued(tiny_folder, run, **steps)
    assert edited.read_text() == before


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "final").write_text(""), r"final is a file.*Move the file away"),
        (lambda run: (run / "config.yaml").write_text(""), r"config\.yaml: not the settings of a run"),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"), r"config\.yaml: not the settings of a run"),
        (lambda run: (run / "config.yaml").unlink(), r"no config\.yaml.*Bring config\.yaml back"),
    ],
    ids=["final is a file", "empty config", "no text in config", "no config"],
)
def test_what_a_run_cannot_do_without_is_named(runs, tiny_folder, tmp_path, spoil, message):
    run = killed_run(runs, tmp_path)
    spoil(run)
    with pytest.raises(ValueError, match=message):
        continued(tiny_folder, run)


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize("settings", [LORA, {"model": "elsewhere"}, {"learning_rate": 2e-3}])
def test_another_run_is_refused(runs, tiny_folder, toy_folder, tmp_path, settings):
    run = killed_run(runs, tmp_path)
    model = toy_folder if "model" in settings else tiny_folder
    with pytest.raises(ValueError, match=r"started with other settings: .*stored.*another --output_dir"):
        continued(model, run, **{name: value for name, value in settings.items() if name != "model"})
