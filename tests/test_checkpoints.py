"""A checkpoint is complete or absent whenever a kill comes; the folder of a run is resumed or refused, never lost."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from trl import TrlParser

from common.config import RLConfig
from common.runs.best import better_checkpoint
from common.runs.checkpoints import (
    latest_checkpoint,
    list_checkpoints,
    load_state,
    load_tensors,
    remove_leftovers,
    rotate,
    save_checkpoint,
    save_final,
    save_tensors,
)
from common.runs.folder import MAY_CHANGE, prepare_run_folder
from common.runs.writable import check_folder

SETTINGS = {"learning_rate": 1e-6, "num_steps": 100, "seed": 0, "rewards": ["format", "equation"], "dataset": None}


def write_part(content):
    return lambda path: path.write_text(content)


def save(folder, step, state=None):
    return save_checkpoint(folder, step, writers={"model": write_part(f"weights {step}")}, state=state or {})


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# Saving


def test_a_checkpoint_holds_what_the_writers_wrote_and_the_state_bit_for_bit(tmp_path):
    def write_model(path):
        path.mkdir()
        (path / "weights").write_text("w")

    state = {"best": {"value": 0.1 + 0.2}, "episodes": 2**60, "stopped_early": False}
    path = save_checkpoint(tmp_path, 7, writers={"policy": write_model, "optimizer": write_part("o")}, state=state)
    assert path == tmp_path / "checkpoint-7" == latest_checkpoint(tmp_path)
    assert names(path) == ["manifest.json", "optimizer", "policy", "trainer_state.json"]
    assert (path / "policy" / "weights").read_text() == "w"
    assert load_state(path) == {"step": 7, **state}
    assert names(tmp_path) == ["checkpoint-7"]


def test_other_users_may_read_what_is_saved_as_far_as_they_may_read_new_files(tmp_path):
    def write_weights(path: Path) -> None:
        path.mkdir()
        save_file({"weight": torch.zeros(2)}, path / "model.safetensors")  # for its owner alone
        os.chmod(path / "model.safetensors", 0o600)

    before = os.umask(0o022)
    try:
        saved = save_checkpoint(tmp_path, 1, writers={"policy": write_weights}, state={})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in saved.rglob("*") if path.is_file()} == {0o644}


def test_the_latest_checkpoint_is_the_one_with_the_highest_number_not_the_last_name(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (100, 9, 20):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-100"


def test_folders_that_are_no_complete_checkpoints_are_ignored(tmp_path):
    save(tmp_path, 3)
    for name in ("checkpoint-4", "checkpoint-5.tmp-12", "checkpoint-x", "checkpoint-6-old"):
        shutil.copytree(tmp_path / "checkpoint-3", tmp_path / name)
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    assert latest_checkpoint(tmp_path).name == "checkpoint-3"
    with pytest.raises(ValueError, match=r"checkpoint-4: not a complete checkpoint"):
        load_state(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("name", ["trainer_state.json", "manifest.json"])
def test_a_checkpoint_whose_files_are_nested_too_deeply_is_damaged(name, tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    (tmp_path / "checkpoint-2" / name).write_text("[" * 100_000)
    assert latest_checkpoint(tmp_path).name == "checkpoint-1"


def test_a_writer_that_fails_leaves_nothing_behind_and_the_same_step_can_be_saved_later(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("no space left on device")

    save(tmp_path, 1)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, 2, writers={"model": write_part("m"), "optimizer": fail}, state={})
    assert names(tmp_path) == ["checkpoint-1"]
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_complete_checkpoint_is_not_written_again_and_an_incomplete_one_is_replaced(tmp_path):
    save(tmp_path, 1, {"first": True})
    save(tmp_path, 1, {"first": False})
    assert load_state(tmp_path / "checkpoint-1")["first"]
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    save(tmp_path, 1, {"first": False})
    assert not load_state(tmp_path / "checkpoint-1")["first"]
    assert names(tmp_path) == ["checkpoint-1"]


def test_an_optimizer_goes_on_bit_for_bit(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, resumed = make(), make()
    steps(*whole, range(6))
    steps(*resumed, range(3))
    save_tensors({"model": resumed[0].state_dict(), "optimizer": resumed[1].state_dict()}, tmp_path / "state.pt")
    model, optimizer = make()
    state = load_tensors(tmp_path / "state.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    steps(model, optimizer, range(3, 6))
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_file_that_holds_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"state": Trap()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="weights_only"):
        load_tensors(tmp_path / "state.pt")
    assert not (tmp_path / "sprung").exists()


# Rotation and the best one


def test_rotation_keeps_the_latest_and_the_best(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step)
    rotate(tmp_path, 2, "checkpoint-3")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    rotate(tmp_path, 1, "checkpoint-7")
    assert names(tmp_path) == ["checkpoint-7"]
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-7"]


def test_the_best_pointer_names_the_step_that_was_evaluated():
    best = None
    for step, value in ((0, 0.2), (5, 0.5), (10, float("nan")), (15, 0.5), (20, 0.4)):
        best = better_checkpoint(best, step, "eval/accuracy", value)
    assert best == {"checkpoint": "checkpoint-5", "metric": "eval/accuracy", "value": 0.5}
    assert better_checkpoint(None, 1, "eval/score", float("inf")) is None
    assert better_checkpoint(best, 25, "eval/accuracy", 0.6)["checkpoint"] == "checkpoint-25"


# Kills. The functions run in processes of their own, forked from one that has imported this module already.

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])


def start(target, *arguments):
    process = processes.Process(target=target, args=arguments, daemon=True)  # a failed test leaves nothing running
    process.start()
    return process


def kill_at(point, target, *arguments):
    """Starts the process, waits until it creates the file `point`, and kills it there."""
    process = start(target, *arguments, point)
    deadline = time.monotonic() + 60
    while not point.exists():
        assert process.is_alive(), "ended before the point"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    point.unlink()


def block(point):
    point.touch()
    time.sleep(600)


def block_before_calls_of(name, point):
    """Lets everything happen but calls of os.<name> or shutil.<name>, of which the first blocks."""
    module = os if hasattr(os, name) else shutil
    setattr(module, name, lambda *args, **kwargs: block(point))


def save_blocked(folder, where, point):
    def write_half(path):
        path.mkdir()
        (path / "weights").write_text("half of")
        if where == "in a writer":
            block(point)

    def write_last(path):
        path.write_text("all of it")
        if where == "before the state":
            block(point)

    if where == "while syncing":
        block_before_calls_of("fsync", point)
    if where == "before the rename":
        block_before_calls_of("replace", point)
    save_checkpoint(folder, 2, writers={"model": write_half, "optimizer": write_last}, state={})


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in a writer", "before the state", "while syncing", "before the rename"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint_as_the_latest(where, tmp_path):
    run = tmp_path / "run"
    assert prepare_run_folder(run, SETTINGS) is None
    save(run, 1)
    kill_at(tmp_path / "point", save_blocked, run, where)
    assert [path.name for path in run.glob("checkpoint-2*")] != []
    assert latest_checkpoint(run) == run / "checkpoint-1"
    assert prepare_run_folder(run, SETTINGS) == run / "checkpoint-1"
    assert names(run) == ["checkpoint-1", "config.yaml"]
    save(run, 2)
    assert (run / "checkpoint-2" / "model").read_text() == "weights 2"


def rotate_blocked(folder, point):
    block_before_calls_of("rmtree", point)
    rotate(folder, 1, "checkpoint-2")


@pytest.mark.slow
def test_a_kill_while_rotating_leaves_whole_checkpoints_only(tmp_path):
    run = tmp_path / "run"
    prepare_run_folder(run, SETTINGS)
    for step in (1, 2, 3, 4):
        save(run, step)
    kill_at(tmp_path / "point", rotate_blocked, run)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert prepare_run_folder(run, SETTINGS).name == "checkpoint-4"
    rotate(run, 1, "checkpoint-2")
    assert names(run) == ["checkpoint-2", "checkpoint-4", "config.yaml"]


def prepare_blocked(folder, point):
    block_before_calls_of("replace", point)
    prepare_run_folder(folder, SETTINGS)


def check_blocked(folder, point):
    block_before_calls_of("fsync", point)
    check_folder(folder)


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [prepare_blocked, check_blocked], ids=["before the settings", "in a try-out"])
def test_a_kill_before_a_run_has_begun_leaves_a_folder_that_can_be_used(tmp_path, blocked):
    kill_at(tmp_path / "point", blocked, tmp_path / "run")
    assert names(tmp_path / "run") != []
    assert prepare_run_folder(tmp_path / "run", SETTINGS, "never") is None
    assert names(tmp_path / "run") == ["config.yaml"]


def save_on_and_on(folder, point):
    prepare_run_folder(folder, SETTINGS | {"num_steps": 10**9})
    checkpoint = latest_checkpoint(folder)
    step = load_state(checkpoint)["step"] if checkpoint else 0
    point.touch()
    while True:
        step += 1
        parts = {f"part{index}": write_part(f"{step} " * 5000) for index in range(5)}
        save_checkpoint(folder, step, writers=parts, state={"again": step})
        rotate(folder, 2, None)


@pytest.mark.slow
def test_after_kills_at_random_moments_the_latest_checkpoint_is_whole_and_the_run_went_on(tmp_path):
    rng, last = random.Random(0), 0
    for _ in range(8):
        process = start(save_on_and_on, tmp_path / "run", tmp_path / "point")
        while not (tmp_path / "point").exists():
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(rng.uniform(0.02, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        (tmp_path / "point").unlink()
        checkpoints = list_checkpoints(tmp_path / "run")
        for checkpoint in checkpoints:
            step = load_state(checkpoint)["again"]
            assert checkpoint.name == f"checkpoint-{step}"
            for index in range(5):
                assert (checkpoint / f"part{index}").read_text() == f"{step} " * 5000
        assert not checkpoints or load_state(checkpoints[-1])["step"] >= last
        last = load_state(checkpoints[-1])["step"] if checkpoints else 0
    assert last > 8


def hold_the_run(folder, point):
    prepare_run_folder(folder, SETTINGS)
    block(point)


def test_a_second_process_is_kept_out_of_a_run_until_the_first_is_dead(tmp_path):
    process = start(hold_the_run, tmp_path / "run", tmp_path / "point")
    while not (tmp_path / "point").exists():
        assert process.is_alive()
        time.sleep(0.005)
    with pytest.raises(ValueError, match=r"run: another process is working on this run.*Wait"):
        prepare_run_folder(tmp_path / "run", SETTINGS)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert prepare_run_folder(tmp_path / "run", SETTINGS) is None


# The run's folder


def test_a_new_run_gets_its_folder_with_settings_and_versions(tmp_path):
    assert prepare_run_folder(tmp_path / "runs" / "new", SETTINGS) is None
    text = (tmp_path / "runs" / "new" / "config.yaml").read_text()
    assert yaml.safe_load(text) == SETTINGS
    for name in ("python 3", f"torch {torch.__version__}", "transformers 5", "trl 1", "vllm"):
        assert name in text


def test_the_stored_settings_repeat_the_run_through_the_parser_of_the_command_line(tmp_path):
    @dataclasses.dataclass(kw_only=True)
    class Config:
        learning_rate: float = 1.0
        num_steps: int = 1
        use_lora: bool = True
        push: bool = False
        dataset: str | None = "something"
        split: str = ""
        rewards: list[str] | None = None
        reward_weights: list[float] | None = None

    config = Config(
        learning_rate=1e-6,
        num_steps=7,
        use_lora=False,
        push=True,
        dataset=None,
        split="train[:10%]",
        rewards=["a", "b"],
        reward_weights=[0.1, 1e-7],
    )
    prepare_run_folder(tmp_path / "run", dataclasses.asdict(config))
    (again,) = TrlParser(Config).parse_args_and_config(["--config", str(tmp_path / "run" / "config.yaml")])
    assert again == config


def test_an_interrupted_run_goes_on_from_its_latest_checkpoint_or_from_its_beginning(tmp_path):
    run = tmp_path / "run"
    prepare_run_folder(run, SETTINGS)
    assert prepare_run_folder(run, SETTINGS) is None
    save(run, 4)
    before = (run / "config.yaml").read_bytes()
    assert prepare_run_folder(str(run), SETTINGS) == run / "checkpoint-4"
    assert (run / "config.yaml").read_bytes() == before


def test_every_differing_setting_is_named_with_both_values_and_nothing_is_touched(tmp_path):
    run = tmp_path / "run"
    prepare_run_folder(run, SETTINGS | {"kl_coef": 0.1})
    save(run, 4)
    (run / "checkpoint-9.tmp-1").mkdir()
    other = SETTINGS | {"learning_rate": 2e-6, "rewards": ["format"], "num_steps": 50, "clip_range": 0.2}
    with pytest.raises(ValueError) as error:
        prepare_run_folder(run, other)
    message = str(error.value)
    assert "learning_rate (stored 1e-06, now 2e-06)" in message
    assert "rewards (stored ['format', 'equation'], now ['format'])" in message
    assert "num_steps (stored 100, now 50)" in message
    assert "kl_coef (stored 0.1, now absent)" in message
    assert "clip_range (stored absent, now 0.2)" in message
    assert "seed" not in message
    assert "Pass" in message
    assert names(run) == ["checkpoint-4", "checkpoint-9.tmp-1", "config.yaml"]


def test_settings_that_may_change_or_grow_are_taken_over(tmp_path):
    run = tmp_path / "run"
    before = SETTINGS | {"save_every": 10, "report_to": None, "max_tokens_per_microbatch": 1024}
    now = SETTINGS | {"save_every": 5, "report_to": ["wandb"], "max_tokens_per_microbatch": 64, "num_steps": 200}
    prepare_run_folder(run, before)
    save(run, 4)
    assert prepare_run_folder(run, now) == run / "checkpoint-4"
    assert yaml.safe_load((run / "config.yaml").read_text()) == now
    with pytest.raises(ValueError, match=r"num_steps \(stored 200, now 201\)"):
        prepare_run_folder(run, now | {"num_steps": 201}, may_grow=())
    assert prepare_run_folder(run, now | {"seed": 5}, may_change=["seed"]) == run / "checkpoint-4"


def test_of_what_decides_the_result_only_the_number_of_steps_may_grow(tmp_path):
    run, settings = tmp_path / "run", dataclasses.asdict(RLConfig())
    prepare_run_folder(run, settings)
    save(run, 4)
    taken = set()
    for name, value in settings.items():
        more = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "another"
        with contextlib.suppress(ValueError):
            prepare_run_folder(run, settings | {name: more})
            taken.add(name)
            settings = settings | {name: more}  # as stored from now on
    learns = {"model", "seed", "learning_rate", "prompts_per_step", "num_generations", "warmup_steps", "kl_coef"}
    assert taken == MAY_CHANGE | {"num_steps"} and not taken & learns


def test_patience_may_grow_and_no_end_is_the_most_of_it(tmp_path):
    run = tmp_path / "run"
    prepare_run_folder(run, SETTINGS | {"early_stopping_patience": 2})
    save(run, 4)
    for patience in (3, 0):
        prepare_run_folder(run, SETTINGS | {"early_stopping_patience": patience})
        with pytest.raises(ValueError, match="early_stopping_patience"):
            prepare_run_folder(run, SETTINGS | {"early_stopping_patience": 2})


def test_checkpoints_that_are_written_in_place_can_be_half_there_and_the_run_begins_again(tmp_path):
    run = tmp_path / "run"
    prepare_run_folder(run, SETTINGS)
    (run / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match="none of its checkpoints is whole"):
        prepare_run_folder(run, SETTINGS)
    assert prepare_run_folder(run, SETTINGS, in_place=True) is None


def test_a_resume_under_other_versions_is_noted_with_its_step(tmp_path):
    run = tmp_path / "run"
    prepare_run_folder(run, SETTINGS)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"torch {torch.__version__}", "torch 1.0"))
    save(run, 4)
    prepare_run_folder(run, SETTINGS)
    origins = [line for line in config.read_text().splitlines() if line.startswith("# From step")]
    assert origins[0].startswith("# From step 0: ") and "torch 1.0" in origins[0]
    assert origins[1].startswith("# From step 4: ") and f"torch {torch.__version__}" in origins[1]
    assert len(origins) == 2


def test_resume_never_refuses_an_existing_run(tmp_path):
    prepare_run_folder(tmp_path / "run", SETTINGS, "never")
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"resume=never: it contains a run.*another --output_dir"):
        prepare_run_folder(tmp_path / "run", SETTINGS, "never")


def test_after_a_start_that_failed_the_folder_takes_other_settings(tmp_path):
    prepare_run_folder(tmp_path / "run", SETTINGS | {"model": "misspelt"})
    assert prepare_run_folder(tmp_path / "run", SETTINGS, "never") is None
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == SETTINGS


def test_settings_that_a_user_wrote_into_the_folder_are_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1  # my favourite\n")
    with pytest.raises(ValueError, match=r"seed \(stored 1, now 0\)"):
        prepare_run_folder(tmp_path, SETTINGS)
    assert (tmp_path / "config.yaml").read_text() == "seed: 1  # my favourite\n"


def test_a_folder_that_is_no_run_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex but no config\.yaml.*Pass another --output_dir"):
        prepare_run_folder(tmp_path, SETTINGS)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"thesis\.tex: it is a file"):
        prepare_run_folder(tmp_path / "thesis.tex", SETTINGS)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1", ""])
def test_a_spoiled_settings_file_is_a_clear_error(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml: not the settings of a run"):
        prepare_run_folder(tmp_path, SETTINGS)


def finish(run, step, **options):
    save_final(run, step, fill=lambda path: (path / "weights").write_text(str(step)), **options)


def test_a_finished_run_says_so_and_can_be_made_longer(tmp_path):
    run = tmp_path / "run"
    prepare_run_folder(run, SETTINGS)
    save(run, 100)
    assert prepare_run_folder(run, SETTINGS) == run / "checkpoint-100"  # final/ is still to be written
    finish(run, 100)
    with pytest.raises(ValueError, match=r"has finished \(after step 100 of 100\).*model is in .*final.*--num_steps"):
        prepare_run_folder(run, SETTINGS)
    longer = SETTINGS | {"num_steps": 150}
    assert prepare_run_folder(run, longer) == run / "checkpoint-100"
    save(run, 150)
    assert prepare_run_folder(run, longer) == run / "checkpoint-150"  # the old final/ is not this run's end
    finish(run, 150)
    assert (run / "final" / "weights").read_text() == "150"
    with pytest.raises(ValueError, match="after step 150 of 150"):
        prepare_run_folder(run, longer)


def test_a_run_that_stopped_early_or_kept_no_checkpoint_is_finished_for_good(tmp_path):
    for name in ("early", "bare"):
        prepare_run_folder(tmp_path / name, SETTINGS)
    save(tmp_path / "early", 40)
    finish(tmp_path / "early", 40, stopped_early=True)
    with pytest.raises(ValueError, match=r"has finished \(early, after step 40 of 100\)"):
        prepare_run_folder(tmp_path / "early", SETTINGS)
    finish(tmp_path / "bare", 100)
    with pytest.raises(ValueError, match="kept no checkpoint to continue from"):
        prepare_run_folder(tmp_path / "bare", SETTINGS | {"num_steps": 200})
    assert json.loads((tmp_path / "bare" / "final" / "trainer_state.json").read_text())["step"] == 100


# Links, and what a kill has left while something was replaced


def linked(path, target):
    target.mkdir(parents=True)
    (target / "trainer_state.json").write_text('{"step": 1}')
    (target / "mine").write_text("on another disk")
    path.symlink_to(target)
    return target


def test_rotation_deletes_a_link_and_not_what_it_points_to(tmp_path):
    run = tmp_path / "run"
    save(run_folder(run), 2)
    target = linked(run / "checkpoint-1", tmp_path / "disk")
    (run / "checkpoint-0").symlink_to("nowhere")
    save(run, 3)
    rotate(run, 1, None)
    assert names(run) == ["checkpoint-0", "checkpoint-3"]
    assert names(target) == ["mine", "trainer_state.json"]


def run_folder(path):
    path.mkdir()
    return path


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    if os.system(f"mount --bind {tmp_path}/checkpoint-1 {tmp_path}/checkpoint-1 2> {os.devnull}"):
        pytest.skip("nothing can be mounted here")
    try:
        rotate(tmp_path, 1, None)
    finally:
        os.system(f"umount {tmp_path}/checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert "checkpoint-1 could not be deleted: Device or resource busy. So this old checkpoint stays" in caplog.text


def test_what_is_left_of_an_old_checkpoint_does_not_keep_the_next_start_from_going_on(tmp_path, caplog):
    run = run_folder(tmp_path / "run")
    save(run, 1)
    busy = run / "checkpoint-1" / "busy"  # as a file that is open elsewhere, on a disk of the network
    busy.mkdir()
    if os.system(f"mount --bind {busy} {busy} 2> {os.devnull}"):
        pytest.skip("nothing can be mounted here")
    save(run, 2)
    rotate(run, 1, None)
    (left,) = run.glob("checkpoint-1.tmp-*")
    try:
        remove_leftovers(run)
        assert f"{left} is of no use, and could not be deleted: " in caplog.text and left.exists()
    finally:
        os.system(f"umount {left}/busy")
    remove_leftovers(run)
    assert names(run) == ["checkpoint-2"]


def test_a_final_model_replaces_a_link_and_not_what_it_points_to(tmp_path):
    run = run_folder(tmp_path / "run")
    target = linked(run / "final", tmp_path / "disk")
    finish(run, 5)
    assert not (run / "final").is_symlink() and (run / "final" / "weights").read_text() == "5"
    assert names(run) == ["final"] and names(target) == ["mine", "trainer_state.json"]


def replace_final_blocked(folder, where, point):
    module, name, is_there = {
        "before the old one is set aside": (os, "replace", lambda path, _: path.name == "final"),
        "between the renames": (os, "replace", lambda _, path: path.name == "final"),
        "before the old one is deleted": (shutil, "rmtree", lambda path: ".tmp-" in path.name),
    }[where]
    real = getattr(module, name)
    setattr(module, name, lambda *args, **options: block(point) if is_there(*args) else real(*args, **options))
    finish(folder, 150)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["before the old one is set aside", "between the renames", "before the old one is deleted"]
)
def test_a_kill_while_the_final_model_is_replaced_costs_neither(where, tmp_path):
    run = tmp_path / "run"
    prepare_run_folder(run, SETTINGS | {"num_steps": 150})
    save(run, 100)
    finish(run, 100)
    kill_at(tmp_path / "point", replace_final_blocked, run, where)
    assert len(names(run)) > 3
    with pytest.raises(ValueError, match="has finished"):
        prepare_run_folder(run, SETTINGS | {"num_steps": 150})
    assert (run / "final" / "weights").read_text() == "150"
    assert names(run) == ["checkpoint-100", "config.yaml", "final"]


def test_the_only_whole_final_model_is_never_a_leftover(tmp_path):
    run = run_folder(tmp_path / "run")
    finish(run, 100)
    (run / "final").rename(run / "final.tmp-7")
    remove_leftovers(run)
    assert names(run) == ["final"] and load_state(run / "final")["step"] == 100


def test_a_final_model_that_is_incomplete_damaged_or_a_link_is_a_leftover(tmp_path):
    run = run_folder(tmp_path / "run")
    finish(run, 100)
    for name in ("final.tmp-1", "final.tmp-2"):
        shutil.copytree(run / "final", run / name)
    (run / "final.tmp-1" / "manifest.json").unlink()
    (run / "final.tmp-2" / "weights").write_text("101")
    (run / "final").rename(tmp_path / "elsewhere")
    (run / "final.tmp-3").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(run)
    assert names(run) == [] and (tmp_path / "elsewhere" / "weights").read_text() == "100"
