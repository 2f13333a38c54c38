"""Metrics are global means, phases add up to the step, and a run's files survive a kill at any moment."""

import io
import json
import math
import multiprocessing
import os
import re
import socket
import struct
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from common.config import RLConfig
from common.mistakes import CannotWrite
from common.runs.log import RunLog
from common.runs.metrics import SignalCheck, StepMetrics, Stopwatch, memory_report
from common.runs.progress import LongWork, Progress
from common.runs.trackers import choose_trackers


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def log(tmp_path, accelerator):
    return RunLog(tmp_path, accelerator, {})


def read_lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


# Shares


def test_a_mean_over_micro_batches_weighs_each_row_the_same(accelerator):
    shares = StepMetrics()
    shares.add("length", 10.0, 1)
    shares.add("length", torch.tensor(2.0 + 3.0 + 5.0), torch.tensor(3))
    assert shares.reduce(accelerator) == {"length": 5.0}


def test_a_mean_over_nothing_is_left_out(accelerator):
    shares = StepMetrics()
    shares.add("kl", torch.tensor(0.0), torch.tensor(0))
    shares.add("score", 1.0, 2)
    assert shares.reduce(accelerator) == {"score": 0.5}


def test_what_is_not_defined_is_left_out_like_a_mean_over_nothing(accelerator):
    metrics = StepMetrics()
    metrics.add_if_defined("value/explained_variance", None)
    metrics.add_if_defined("value_init/explained_variance_after", 0.0)
    assert metrics.reduce(accelerator) == {"value_init/explained_variance_after": 0.0}


def test_every_step_starts_from_nothing(accelerator):
    shares = StepMetrics()
    shares.add("score", 6.0, 2)
    shares.reduce(accelerator)
    shares.add("score", 1.0, 1)
    assert shares.reduce(accelerator) == {"score": 1.0}


def test_thousands_of_small_float32_shares_lose_nothing(accelerator):
    shares, share = StepMetrics(), torch.tensor(0.1)
    for _ in range(2000):
        shares.add("kl", share, 1)
    assert shares.reduce(accelerator)["kl"] == pytest.approx(share.item(), rel=1e-12)


def test_a_share_keeps_no_graph_and_no_later_change_of_the_tensor(accelerator):
    loss = torch.ones((), requires_grad=True) * 3.0
    shares = StepMetrics()
    shares.add("policy/loss", loss, 1)
    loss.detach().zero_()
    assert shares.reduce(accelerator) == {"policy/loss": 3.0}


def test_sums_are_added_and_of_peaks_the_highest_or_lowest_counts(accelerator):
    shares = StepMetrics()
    for tokens, peak in ((7, 1.5), (5, 2.5), (1, 0.5)):
        shares.add_sum("tokens", tokens)
        shares.add_max("memory/peak_gb", peak)
        shares.add_min("score_min", peak)
    assert shares.reduce(accelerator) == {"tokens": 13, "memory/peak_gb": 2.5, "score_min": 0.5}


@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan)])
def test_the_highest_and_the_lowest_of_what_is_no_number_are_none_in_any_order(accelerator, order):
    shares = StepMetrics()
    for value in order:
        shares.add_max("score_max", value)
        shares.add_min("score_min", value)
    assert all(map(math.isnan, shares.reduce(accelerator).values()))


def reduce_in_process(rank, port, answers):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator = Accelerator(cpu=True)
    shares = StepMetrics()
    if rank == 0:  # three rows here, one there
        shares.add("score", torch.tensor(1.0 + 2.0 + 3.0), 3)
        shares.add("only_here", 4.0, 1)
        shares.add("nowhere", 0.0, 0)
    else:
        shares.add("score", 10.0, torch.tensor(1))
    shares.add_sum("tokens", 5 + rank)
    shares.add_max("memory/peak_gb", float(rank))
    shares.add_min("score_min", float(rank))
    first = shares.reduce(accelerator)
    if rank == 1:  # a process that was left without rows
        shares.add("kl", torch.tensor(0.75), torch.tensor(3))
    answers.put((first, shares.reduce(accelerator)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_unequal_rows_and_names_get_the_same_exact_means():
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.SimpleQueue()
    processes = [context.Process(target=reduce_in_process, args=(rank, port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = {"score": 4.0, "only_here": 4.0, "tokens": 11, "memory/peak_gb": 1.0, "score_min": 0.0}
    for first, second in (answers.get(), answers.get()):
        assert first == expected
        assert second == {"kl": 0.25}


# Time and memory


@pytest.fixture
def passes(monkeypatch):
    """A clock that goes on only by `passes(seconds)`."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def times_of(watch):
    return {name: value for name, value in watch.read_and_reset().items() if name.startswith("time/")}


def test_phases_add_up_to_the_step_also_when_nested(passes):
    watch = Stopwatch()
    with watch("sample"):
        passes(1)
        with watch("push"):
            passes(2)
            with watch("offload"):
                passes(4)
            passes(8)
        with watch("push"):
            passes(16)
        passes(32)
    with watch("update"):
        passes(64)
    expected = {"time/sample": 33, "time/push": 26, "time/offload": 4, "time/update": 64, "time/step": 127}
    assert times_of(watch) == expected


def test_what_runs_in_no_phase_counts_for_the_step_alone(passes):
    watch = Stopwatch()
    passes(1)
    with watch("score"):
        passes(2)
    passes(4)
    assert times_of(watch) == {"time/score": 2, "time/step": 7}


def test_sampling_for_an_evaluation_is_no_sampling_for_training(passes):
    watch = Stopwatch()
    with watch("eval"):
        with watch("sample"), watch("push"):
            passes(1)
        passes(2)
    with watch("sample"):
        passes(4)
    assert times_of(watch) == {"time/eval": 3, "time/sample": 4, "time/step": 7}


def test_of_what_came_before_the_first_step_only_its_preparation_counts_and_adds_up_with_the_rest(passes):
    watch = Stopwatch()
    with watch("offload"):
        passes(1)  # loading
    with watch("value_init"):
        with watch("sample"):
            passes(2)
        passes(4)
    passes(8)  # between making a trainer and training
    watch.start_first_step()
    with watch("sample"):
        passes(16)
    passes(32)
    assert times_of(watch) == {"time/value_init": 6, "time/sample": 16, "time/step": 54}
    with watch("sample"):
        passes(64)
    assert times_of(watch) == {"time/sample": 64, "time/step": 64}


def test_the_stopwatch_starts_again_at_zero_and_survives_an_error_in_a_phase(passes):
    watch = Stopwatch()
    with pytest.raises(RuntimeError), watch("update"):
        passes(1)
        raise RuntimeError
    passes(2)
    assert times_of(watch) == {"time/update": 1, "time/step": 3}
    with watch("sample"):
        passes(4)
    assert times_of(watch) == {"time/sample": 4, "time/step": 4}


def test_the_stopwatch_measures_real_seconds():
    watch = Stopwatch()
    with watch("update"):
        time.sleep(0.05)
    assert 0.05 <= times_of(watch)["time/update"] < 1


def test_host_memory_falls_again_and_the_peak_remembers():
    before = memory_report("cpu")["memory/host_gb"]
    ballast = torch.ones(2**27)  # half a GB
    during = memory_report("cpu")["memory/host_gb"]
    assert during - before == pytest.approx(0.5, abs=0.1)
    del ballast
    after = memory_report("cpu")
    assert after["memory/host_gb"] < during - 0.4
    assert after["memory/peak_gb"] == pytest.approx(during, abs=0.1)


@pytest.mark.gpu
def test_on_a_gpu_every_phase_has_its_own_peak_and_its_own_time():
    watch = Stopwatch("cuda")
    torch.zeros(2**30, device="cuda", dtype=torch.uint8)
    with watch("sample"):
        torch.zeros(2**29, device="cuda", dtype=torch.uint8)
    with watch("update"):
        torch.cuda._sleep(10**8)
    with watch("push"):
        pass
    report = watch.read_and_reset()
    assert report["memory/peak_gb"] == pytest.approx(1, abs=0.1)
    assert report["memory/sample_peak_gb"] == pytest.approx(0.5, abs=0.1)
    assert report["memory/update_peak_gb"] < 0.1
    assert report["time/update"] > 10 * report["time/push"]
    assert watch.read_and_reset()["memory/peak_gb"] < 0.1


# Files


def test_floats_come_back_bit_equal_and_the_line_starts_with_what_is_read_first(log, tmp_path):
    metrics = {"kl": 0.1 + 0.2, "score": 1 / 3, "length": torch.tensor(0.1), "lr": 1e-6, "eval/accuracy": 5e-324}
    log.log(7, metrics | {"tokens": 12345, "episodes": 64})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line.startswith('{"step": 7, "episodes": 64, "tokens": 12345, "score": 0.3333333333333333, ')
    read = json.loads(line)
    for name, value in metrics.items():
        assert struct.pack("d", read[name]) == struct.pack("d", float(value))


def test_the_line_does_not_depend_on_the_order_in_which_metrics_arrive(log, tmp_path):
    metrics = {"score": 1.0, "kl": 2.0, "entropy": 3.0, "reward/format": 4.0}
    log.log(1, metrics)
    log.log(1, dict(reversed(metrics.items())))
    first, second = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert first == second


def test_what_is_not_finite_is_null_and_the_json_is_valid(log, tmp_path):
    log.log(1, {"kl": math.nan, "score": math.inf, "length": -math.inf, "entropy": torch.tensor(math.nan)})
    log.samples(1, [{"prompt": "a", "parts": {"format": math.nan}, "score": [math.inf, 1.0]}])
    refuse = pytest.fail
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert metrics == {"step": 1, "kl": None, "score": None, "length": None, "entropy": None}
    sample = json.loads((tmp_path / "samples.jsonl").read_text(), parse_constant=refuse)
    assert sample == {"step": 1, "prompt": "a", "parts": {"format": None}, "score": [None, 1.0]}


def test_any_text_makes_one_line_of_samples_and_comes_back(log, tmp_path):
    texts = ["two\nlines", "\u2028\u0085", "数え上げ", "half a pair \ud83d", '"quoted" \\', "\x00"]
    log.samples(3, [{"prompt": text, "completion": text} for text in texts])
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == len(texts)
    assert [row["completion"] for row in read_lines(tmp_path / "samples.jsonl")] == texts


def test_a_line_is_on_disk_when_log_returns(log, tmp_path):
    for step in range(3):
        log.log(step, {"score": 1.0})
        assert len(read_lines(tmp_path / "metrics.jsonl")) == step + 1


def test_a_full_disk_leaves_no_part_of_a_line(log, tmp_path, monkeypatch):
    log.log(1, {"score": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CannotWrite, match="No space"):
            log.log(2, {"score": 2.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log.log(2, {"score": 2.0})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_rewind_and_writing_again_gives_the_bytes_of_an_uninterrupted_run(tmp_path, accelerator):
    def write(log, steps):
        for step in steps:
            log.log(step, {"score": step / 7, "kl": math.nan})
            log.samples(step, [{"prompt": f"p{row}", "completion": "é", "score": 0.5} for row in range(2)])

    logs = {name: RunLog(tmp_path / name, accelerator, {}) for name in ("whole", "resumed")}
    for log in logs.values():
        log.folder.mkdir()
    write(logs["whole"], range(11))
    write(logs["resumed"], range(8))
    for name in ("metrics.jsonl", "samples.jsonl"):  # killed while writing; cut within a character
        with open(logs["resumed"].folder / name, "ab") as file:
            file.write('{"step": 8, "score": 1.14, "completion": "é'.encode()[:-1])
    logs["resumed"].rewind(5)
    write(logs["resumed"], range(6, 11))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (logs["resumed"].folder / name).read_bytes() == (logs["whole"].folder / name).read_bytes()
    assert sorted(path.name for path in logs["resumed"].folder.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_rewind_to_the_very_beginning_drops_the_evaluation_before_training(log, tmp_path):
    log.rewind(-1)  # nothing there yet
    log.log(0, {"eval/accuracy": 0.5})
    log.rewind(-1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_an_unknown_or_missing_tracker_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"report_to='wandbb'.*knows only.*wandb"):
        choose_trackers(["wandbb"])
    with pytest.raises(ValueError, match=r"report_to='aim'.*not installed"):
        choose_trackers(["aim"])
    assert choose_trackers(None) == []


@pytest.mark.slow
def test_wandb_without_an_account_works_offline_and_silently(tmp_path, monkeypatch, capfd):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_MODE", "WANDB_SILENT"):  # set, so that it is restored, and then removed
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    trackers = choose_trackers(["wandb"])
    accelerator = Accelerator(cpu=True, log_with=trackers, project_dir="elsewhere")
    log = RunLog(tmp_path, accelerator, {"seed": 1, "rewards": None})
    assert accelerator.logging_dir == str(tmp_path)
    log.samples(1, [{"prompt": "1 2 3", "completion": "1+2", "score": 0.5}])
    log.log(1, {"score": 0.5, "kl": math.nan})
    log.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "score": 0.5, "kl": None}]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("account", ["key", "netrc", "mode"])
def test_wandb_with_an_account_or_a_wish_is_left_alone(account, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if account == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    elif account == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0000\n")
    else:
        monkeypatch.setenv("WANDB_MODE", "online")
    choose_trackers(["wandb"])
    assert os.environ.get("WANDB_MODE") == ("online" if account == "mode" else None)


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_progress(file, num_steps, **options):
    progress = Progress(num_steps, file=file, **options)
    progress.update(0, {"eval/accuracy": 0.25})
    for step in range(1, num_steps + 1):
        evaluation = {"eval/accuracy": 0.5} if step == num_steps else {}
        progress.update(step, {"score": step / num_steps} | evaluation)
    progress.close()
    return file.getvalue()


def test_a_terminal_sees_one_line_that_is_rewritten():
    shown = run_progress(Terminal(), 10)
    assert shown.count("\n") == 1
    *_, last = shown.strip().split("\r")
    assert re.fullmatch(r"10/10 \|[█#]+\| 00:00 left, score 1\.000, eval/accuracy 0\.500", last.strip())
    assert "5/10" in shown
    assert "score 0.500, eval/accuracy 0.250" in shown


def test_a_file_gets_a_few_whole_lines_without_control_characters():
    shown = run_progress(io.StringIO(), 1000)
    lines = shown.splitlines()
    assert len(lines) <= Progress.MAX_PLAIN_LINES + 1
    assert "\r" not in shown
    assert lines[0] == "step 0/1000: eval/accuracy 0.250"
    assert re.fullmatch(r"step 500/1000: score 0\.500, eval/accuracy 0\.250, 00:0\d left", lines[len(lines) // 2])
    assert lines[-1].startswith("step 1000/1000: score 1.000, eval/accuracy 0.500")


def test_the_time_left_of_a_resumed_run_is_told_by_its_own_steps(monkeypatch):
    now = iter([100.0, 106.0])  # seconds: one step took six, and one is left
    monkeypatch.setattr("common.runs.progress.time.monotonic", lambda: next(now))
    file = io.StringIO()
    Progress(10, start=8, file=file).update(9, {"score": 1.0})
    assert file.getvalue() == "step 9/10: score 1.000, 00:06 left\n"


def test_progress_switched_off_shows_nothing():
    assert run_progress(Terminal(), 5, enabled=False) == run_progress(io.StringIO(), 5, enabled=False) == ""


@pytest.fixture
def impatient(monkeypatch):
    """Lines come every hundredth of a second, not every minute."""
    monkeypatch.setattr(LongWork, "SECONDS_BETWEEN_LINES", 0.01)


def lines_of(file, number):
    """At least so many lines, as soon as they are there."""
    end = time.monotonic() + 10
    while file.getvalue().count("\n") < number and time.monotonic() < end:
        time.sleep(0.005)
    return file.getvalue().splitlines()


def test_long_work_writes_lines_to_a_file_also_while_nothing_is_done(impatient):
    file = io.StringIO()
    with LongWork("evaluation", 8, "completions", file=file) as work:
        assert set(lines_of(file, 2)) == {"evaluation: 0 of 8 completions after 00:00"}
        work.advance(3)
        assert lines_of(file, file.getvalue().count("\n") + 2)[-1] == (
            "evaluation: 3 of 8 completions after 00:00, 00:00 left"
        )
    written = file.getvalue()
    time.sleep(0.05)
    assert file.getvalue() == written


def test_long_work_that_is_over_within_a_minute_leaves_no_line():
    file = io.StringIO()
    with LongWork("evaluation", 8, "completions", file=file) as work:
        work.advance(8)
    assert LongWork.SECONDS_BETWEEN_LINES == 60 and file.getvalue() == ""


def test_the_time_left_is_told_by_what_was_done_since_the_start():
    with LongWork("sampling", 10, "completions", done=6, file=io.StringIO()) as work:
        assert work.line(90) == "sampling: 6 of 10 completions after 01:30"
        work.advance(3)
        assert work.line(90) == "sampling: 9 of 10 completions after 01:30, 00:30 left"


def test_long_work_is_a_bar_on_a_terminal_and_nothing_where_it_is_switched_off(impatient):
    terminal, off = Terminal(), Terminal()
    for file, enabled in ((terminal, True), (off, False), (quiet := io.StringIO(), False)):
        with LongWork("evaluation", 8, "completions", file=file, enabled=enabled) as work:
            work.advance(8)
            time.sleep(0.03)
    assert "evaluation: 100%" in terminal.getvalue() and "\n" not in terminal.getvalue()
    assert off.getvalue() == quiet.getvalue() == ""


# What every run is checked for


def silent(**metrics):
    return {"score": 0.5, "score_min": 0.0, "score_max": 1.0, "equal_scores": 1.0, "zero_advantage": 1.0} | metrics


HEARD = silent(equal_scores=0.9, zero_advantage=0.9)
ALONE = {"score": 1.0, "score_min": 1.0, "score_max": 1.0, "zero_advantage": 0.0}  # one completion per prompt
ALL_MASKED = {"score": 0.0, "score_min": 0.0, "score_max": 1.0, "equal_scores": 0.0}


@pytest.mark.parametrize(
    ("settings", "metrics", "said"),
    [
        ({}, silent(), "all completions of a prompt had the same score (0.5 on average over prompts), so"),
        # As with a KL in the reward.
        ({}, silent(zero_advantage=0.2), "all completions of a prompt had the same score"),
        ({}, silent(score=0.0, score_max=0.0), "all completions had the score 0, so"),
        ({"num_generations": 1}, ALONE, "all completions had the score 1, so"),
        ({}, silent(equal_scores=0.5), "no completion was better or worse than what it is compared with"),
        ({}, ALL_MASKED, "the length limit cut off all completions, and mask_truncated leaves them out"),
        ({}, silent(truncated=0.75), "75% of the completions were cut off: pass a larger --max_completion_length"),
        ({"num_generations": 4}, silent(), "more than --num_generations 4"),
        ({"temperature": 0.3}, silent(), "a higher --temperature than 0.3"),
    ],
)
def test_three_steps_without_anything_to_learn_are_warned_of_once(settings, metrics, said, caplog):
    check = SignalCheck(RLConfig(max_completion_length=9, **settings), Path("runs/x"))
    for step, seen in enumerate([metrics, metrics, HEARD, metrics, metrics], 1):
        check.see(seen, step=step)
        check.see({"eval/score": 0.0}, step=step)
    assert not caplog.messages
    for step in range(6, 20):
        check.see(metrics, step=step)
    for step, seen in enumerate([HEARD, metrics, metrics, metrics], 20):
        check.see(seen, step=step)
    (message,) = caplog.messages
    assert message.startswith("steps 4 to 6: ") and said in message and len(message.splitlines()) <= 6
    assert "python -m common.samples runs/x" in message


def test_groups_of_equal_scores_are_no_reason_to_warn_where_others_took_their_place(caplog):
    check = SignalCheck(RLConfig(), Path("runs/x"))
    filled = silent(zero_advantage=0.2) | {"refill/filled": 3}
    for step in range(1, 6):
        check.see(filled, step=step)
    assert not caplog.messages
    for step in range(6, 10):
        check.see(filled | {"refill/filled": 0, "zero_advantage": 1.0}, step=step)
    assert len(caplog.messages) == 1


OF_REFILLS = {"refill/rounds": 4.0, "refill/filled": 0.0, "refill/left_empty": 7.0, "refill/completions": 224.0}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (
            silent(equal_scores=0.1, zero_advantage=0.1),
            "no group of equal scores could be replaced by that of another",
        ),
        (silent(), "all completions of a prompt had the same score"),  # and no second message
    ],
)
@pytest.mark.parametrize(
    ("rounds", "cause"),
    [
        (4.0, "refills found no other prompt's group whose scores differ, in 4 rounds of 224 more completions: until"),
        (0.0, "refills have no prompts but the step's own: fewer --prompts_per_step than 64, or more data"),
    ],
)
def test_three_steps_of_refills_in_vain_are_warned_of_once(caplog, metrics, said, rounds, cause):
    check, metrics = SignalCheck(RLConfig(), Path("runs/x")), metrics | OF_REFILLS | {"refill/rounds": rounds}
    found = HEARD | OF_REFILLS | {"refill/filled": 1.0}
    complete = HEARD | OF_REFILLS | {"refill/rounds": 0.0, "refill/left_empty": 0.0}
    for step, seen in enumerate([metrics, metrics, found, metrics, metrics, complete, *[metrics] * 5, found], 1):
        check.see(seen, step=step)
    for step in range(13, 20):
        check.see(metrics, step=step)
    (message,) = caplog.messages
    assert message.startswith(f"steps 7 to 9: {said}") and cause in message and "prompts are too hard" in message


def test_a_single_completion_is_no_reason_to_warn(caplog):
    check = SignalCheck(RLConfig(prompts_per_step=1, num_generations=1), Path("runs/x"))
    for step in range(1, 6):
        check.see(ALONE, step=step)
    assert not caplog.messages
