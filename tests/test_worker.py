"""The processes of rules: what ends with them, which limits they need, what they print, and rows without a score."""

import contextlib
import ctypes
import faulthandler
import inspect
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from common.processes import children
from common.rewards.answers import Lost
from common.rewards.keeper import END
from common.rewards.prints import MOST_BYTES
from common.rewards.rules import rule, warmed_up_by
from common.rewards.secret_variables import is_secret
from common.rewards.worker import Limits, RuleWorker
from common.runs.lost_rows import LostRows, judge_evaluation
from tests.forked import run as run_forked
from tests.toy import ROOT, algorithms, metrics_of, toy_config, toy_task

SHORT = Limits(seconds=0.2, gigabytes=0.5)


def scored(function, *completions: str, limits: Limits = SHORT) -> list:
    return RuleWorker({"it": function}, limits)("it", {"completions": list(completions)})


def running(seconds: str) -> list[int]:
    """Processes `sleep <seconds>`; each test sleeps for its own time."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and (entry / "cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(int(entry.name))
    return found


def forked(action) -> tuple[int, int]:
    """A process that runs `action` and ends; its number, and a file descriptor of what it prints."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for number in (1, 2, 3):
                os.dup2(write_end, number)
            sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
            os.closerange(4, 1000)
            action()
        except BaseException as error:
            print(type(error).__name__, error)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(write_end)
    return pid, read_end


def said_by(action) -> str:
    """What a process prints that runs `action`."""
    pid, read_end = forked(action)
    with open(read_end) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def script(code: str, *, shell: str = "", **options: object) -> subprocess.CompletedProcess:
    """Run code in a program of its own, below what a shell sets."""
    command = f'{shell} exec "$0" -c "$1"'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, code],
        **{"capture_output": True, "text": True, "cwd": ROOT, "timeout": 120} | options,
    )


# Programs that a rule starts


PROGRAMS = ["exec sleep {}", "setsid sleep {} & wait", "(setsid sh -c 'sleep {} & sleep {}' &) ; sleep {}"]


@pytest.mark.slow
def test_what_a_rule_started_ends_with_a_row_over_the_limit():
    seconds = f"6{os.getpid()}"
    commands = [PROGRAMS[row % 3].format(*[seconds] * 3) for row in range(20)]

    def starts(completions):
        subprocess.run(completions[0], shell=True)

    rows = scored(starts, *commands, limits=Limits(seconds=0.02, gigabytes=0.5))
    assert [row.over_limit for row in rows] == [True] * 20
    assert running(seconds) == []


def test_what_a_rule_started_ends_with_a_row_that_ends_in_time():
    seconds = f"7{os.getpid()}"
    command = f"(setsid sh -c 'sleep {seconds} & sleep {seconds}' &) ; sleep {seconds} &"

    def starts(completions):
        before = len(running(seconds))
        subprocess.run(command, shell=True)
        return [float(before)]

    assert [row.reward for row in scored(starts, "a", "b", "c", limits=Limits())] == [0, 0, 0]
    assert running(seconds) == []


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_what_a_rule_started_ends_with_the_run_however_that_ends(kill):
    seconds = f"8{os.getpid()}"

    @warmed_up_by(lambda: subprocess.Popen(["sleep", seconds]))
    def starts(completions):
        subprocess.Popen(["setsid", "sleep", seconds])
        subprocess.run(["sleep", seconds])

    run, read_end = forked(lambda: scored(starts, "a", limits=Limits(seconds=60)))
    wait_until(lambda: len(running(seconds)) == 3, 30)  # one of them by the warm-up
    kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    os.close(read_end)
    wait_until(lambda: not running(seconds), 10)


def test_a_warm_up_that_handles_every_error_ends_with_the_worker(capfd):
    seconds = f"7{os.getpid()}"

    def warm() -> None:
        subprocess.Popen(["sleep", seconds])
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(0.01)

    worker = RuleWorker({"it": warmed_up_by(warm)(lambda completions: [1.0])}, SHORT)
    wait_until(lambda: running(seconds), 30)
    before = time.monotonic()
    del worker
    assert time.monotonic() - before < 5 and not running(seconds)
    assert capfd.readouterr().err == ""


def wait_until(condition, seconds: float) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.02)


def test_a_program_of_a_warm_up_lives_on_for_all_rows_and_ends_with_the_worker():
    seconds = f"9{os.getpid()}"

    @warmed_up_by(lambda: subprocess.Popen(["sleep", seconds]))
    def counts(completions):
        if completions == ["hang"]:
            subprocess.run(["sleep", seconds])
        return [float(len(running(seconds)))]

    worker = RuleWorker({"it": counts}, SHORT)
    assert [row.reward for row in worker("it", {"completions": ["a", "hang", "b"]})][::2] == [1, 1]
    del worker
    assert running(seconds) == []


def test_signals_to_the_run_and_its_group_do_not_reach_rules():
    def where(completions):
        return [float(os.getpgid(0) == os.getpgid(os.getppid()) or os.getpgid(0) == group)]

    group = os.getpgid(0)
    before = children()
    worker = RuleWorker({"it": where}, SHORT)
    [keeper] = children() - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(keeper, number)  # as a queueing system does to all processes of a job
    assert os.getpgid(keeper) != group and worker("it", {"completions": ["a"]})[0].reward == 0
    assert children() - before == {keeper}


def test_a_row_whose_process_got_a_signal_from_a_queue_is_scored_again(tmp_path):
    def once(completions):
        if completions == ["b"] and not (tmp_path / "was here").exists():
            (tmp_path / "was here").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        if completions == ["always"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return [3.0]

    rows = scored(once, "a", "b", "always", "c")
    assert [row.reward for row in rows][:2] == [3, 3] and rows[3].reward == 3
    assert rows[2].over_limit and "SIGTERM" in rows[2].cause


def test_a_child_that_a_rule_forks_gives_no_second_answer():
    assert [row.reward for row in scored(lambda completions: [float(os.fork() == 0)], "a", "b")] == [0, 0]


def test_the_keeper_survives_the_end_of_the_thread_that_started_it(caplog):
    made = []
    thread = threading.Thread(target=lambda: made.append(RuleWorker({"it": lambda completions: [1.0]}, SHORT)))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert made[0]("it", {"completions": ["a"]})[0].reward == 1 and not caplog.records


def test_after_an_interrupted_call_the_next_one_gets_its_own_answers():
    worker = RuleWorker({"it": lambda completions: [time.sleep(1.0) or float(len(completions[0]))]}, SHORT)
    worker("it", {"completions": ["a"]})  # its process is there, so that the signal comes while a row is scored
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            worker("it", {"completions": ["abc"]})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert worker("it", {"completions": ["a"]})[0].reward == 1


# What is no row's fault


def test_a_killed_keeper_is_said_and_killed_twice_it_is_an_error(caplog):
    before = children()
    worker = RuleWorker({"it": lambda completions: [1.0]}, SHORT)
    [keeper] = children() - before
    os.kill(keeper, signal.SIGKILL)
    assert worker("it", {"completions": ["a"]})[0].reward == 1
    assert "signal 9 (SIGKILL)" in caplog.text and "scores the same rows again" in caplog.text
    with pytest.raises(ValueError, match=r"'it' was killed twice in a row: .*out of memory"):
        scored(lambda completions: os.kill(os.getppid(), signal.SIGKILL), "a")


def test_what_a_rule_started_ends_with_a_keeper_that_is_killed(tmp_path):
    seconds, was_here = f"5{os.getpid()}", tmp_path / "was here"

    def starts_once(completions):
        if not was_here.exists():
            was_here.touch()
            subprocess.run(f"sleep {seconds} & sleep {seconds}", shell=True)
        return [1.0]

    before = children()
    worker = RuleWorker({"it": starts_once}, Limits())
    [keeper] = children() - before

    def kill() -> None:
        wait_until(lambda: len(running(seconds)) == 2, 10)
        os.kill(keeper, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert worker("it", {"completions": ["a"]})[0].reward == 1
    killer.join()
    assert running(seconds) == []


def test_a_worker_that_was_killed_between_two_calls_costs_no_row():
    worker = RuleWorker({"it": lambda completions: [float(os.getpid())]}, SHORT)
    [first] = worker("it", {"completions": ["a"]})
    os.kill(int(first.reward), signal.SIGKILL)
    wait_until(lambda: ") Z " in Path(f"/proc/{first.reward:.0f}/stat").read_text(), 10)
    [second] = worker("it", {"completions": ["a"]})
    assert not second.over_limit and second.reward != first.reward


LENGTHS = """
from common.rewards.worker import Limits, RuleWorker
worker = RuleWorker({"it": lambda completions: [float(len(completions[0]))]}, Limits())
print([tuple(row[:3]) for row in worker("it", {"completions": ["a", "bb"]})])
"""


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.slow
def test_under_a_limit_on_memory_of_a_queue_rules_score_as_without():
    done = script(LENGTHS, shell="ulimit -v 2500000;")
    assert done.stdout == "[(1.0, None, False), (2.0, None, False)]\n", done.stderr


@pytest.mark.parametrize("hard", [True, False])
def test_a_row_may_use_what_a_limit_leaves_it(hard):
    def takes(completions):
        return [float(len(bytearray(int(completions[0]))))]

    def limited():
        limit = address_space() + 1_000_000_000  # less than the rules' own limit of 2 GB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit if hard else resource.RLIM_INFINITY))
        rows = scored(takes, "5", "1500000000", "6", limits=Limits())
        print([row.reward for row in rows], rows[1].cause)

    said = said_by(limited)
    assert said.startswith("[5.0, nan, 6.0] more than ") and said.endswith(" GB of memory\n"), said
    assert 0.8 <= float(said.split()[-4]) <= 1.0


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize(
    ("limit", "number", "user", "message"),
    [
        (resource.RLIMIT_AS, lambda: address_space() + 50_000_000, None, "ulimit -v leaves it 0.0"),
        (resource.RLIMIT_NOFILE, lambda: 5, None, "no more files may be opened (ulimit -n)"),  # for the keeper
        (resource.RLIMIT_NOFILE, lambda: 8, None, "no more files may be opened (ulimit -n)"),  # for the worker
        (resource.RLIMIT_NPROC, threads, 54321, "ulimit -u"),
        (resource.RLIMIT_NPROC, lambda: threads() + 1, 54322, "ulimit -u"),
    ],
)
def test_a_limit_that_keeps_rules_from_running_is_an_error_that_names_it(limit, number, user, message):
    if user and os.getuid():
        pytest.skip("limits the processes of a user without any, and only root can become one")

    def limited():
        resource.setrlimit(limit, (number(),) * 2)
        if user:
            os.setuid(user)
        print(scored(lambda completions: [1.0], "a", limits=Limits()))

    said = said_by(limited)
    assert said.startswith("ValueError the process that runs rules (it) cannot start: "), said
    assert message in said and "Limits in force: ulimit" in said and "--reward_time_limit 0" in said
    assert len(said.splitlines()) <= 8


class Mute(Exception):
    def __str__(self):
        raise MemoryError


@pytest.mark.parametrize(
    ("raises", "message"),
    [
        (Mute(), "Mute, whose text cannot be shown because of another MemoryError"),
        (ValueError("x" * 10_000_000), "ValueError: xxx"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
    ],
)
def test_an_exception_with_an_odd_text_is_an_error_of_its_row(raises, message):
    def raising(completions):
        if completions == ["b"]:
            raise raises
        return [1.0]

    rows = scored(raising, "a", "b", "c", limits=Limits())
    assert len(rows) == 2 and rows[1].error.startswith(message) and not rows[1].over_limit


HERE = os.getpid()


class Once:
    """Can be read in the keeper, but not in the worker."""

    def __reduce__(self):
        return _only_below, (HERE,)


def _only_below(pid):
    if os.getppid() != pid:
        raise KeyError("another process")
    return Once()


def test_a_value_that_cannot_be_read_where_it_is_used_is_an_error_and_no_lost_row():
    worker = RuleWorker({"it": lambda completions, column: [1.0]}, SHORT)
    for _ in range(2):
        [row] = worker("it", {"completions": ["a"], "column": [Once()]})
        assert row.error == "KeyError: 'another process'"


@pytest.mark.parametrize(
    ("accident", "cause"),
    [
        (lambda: bytearray(4_000_000_000), "more than 0.5 GB of memory"),
        # Without pytest's report of the crash, which takes processor time.
        (lambda: (faulthandler.disable(), ctypes.string_at(0)), r"signal 11 (SIGSEGV) ended its process"),
        (lambda: os._exit(3), "its process ended with status 3"),
        (lambda: list(iter(int, 1)), "more than 0.2 s of processor time"),
        (lambda: time.sleep(60), "more than 2 s on the clock"),
        (lambda: os.closerange(0, 99), "status 0"),
        (lambda: os.closerange(0, 99) or time.sleep(60), "it closed the file that its answers go into"),
    ],
)
def test_a_row_over_a_limit_says_which_one(accident, cause):
    rows = scored(lambda completions: (completions == ["x"] and accident()) or [1.0], "a", "x", "b")
    assert [row.over_limit for row in rows] == [False, True, False]
    assert cause in rows[1].cause and 0 < rows[1].seconds < 20


# Prints


def prints(completions):
    print("said of", completions[0])
    print("on the other output", file=sys.stderr)
    subprocess.run(["echo", "by a program"])
    ctypes.CDLL(None).puts(b"by C")
    return [1.0]


def test_what_a_rule_prints_appears_in_order_and_before_the_answers(capfd):
    scored(prints, "one \x1b[31mred", "zwei ü", limits=Limits())
    out, err = capfd.readouterr()
    lines = ["by a program", "by C"]
    assert out.splitlines() == [r"said of one \x1b[31mred", *lines, "said of zwei ü", *lines]
    assert err.splitlines() == ["on the other output"] * 2


@pytest.mark.slow
def test_prints_go_into_a_file_once_each_and_before_later_words(tmp_path):
    code = f"""
import ctypes, subprocess, sys
from common.rewards.worker import Limits, RuleWorker
{inspect.getsource(prints)}
print("begin")  # waits in a buffer that a fork copies
worker = RuleWorker(dict(prints=prints), Limits())
worker("prints", dict(completions=["one"]))
print("end")
"""
    done = script(code, env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert done.stdout.splitlines() == ["begin", "said of one", "by a program", "by C", "end"], done.stderr
    assert done.stderr.splitlines() == ["on the other output"]


def test_many_prints_are_cut_at_a_line_and_what_was_left_out_is_said(capfd):
    def much(completions):
        for number in range(1000):
            print("x" * 9999, number)
        return [1.0]

    assert scored(much, "a", "b", limits=Limits())[1].reward == 1
    out = capfd.readouterr().out
    assert len(out) < MOST_BYTES + 200 and "[the rule 'it' printed 20,0" in out and "left out]" in out

    def lines(completions):
        print("\n".join(f"line {number}" for number in range(5000)))
        return [1.0]

    scored(lines, "a", limits=Limits())
    *shown, remark = capfd.readouterr().out.splitlines()
    assert shown == [f"line {number}" for number in range(len(shown))] and "left out]" in remark


def test_what_a_row_printed_before_it_was_ended_is_shown_with_it(capfd):
    worker = RuleWorker({"it": lambda completions: print("before the end", flush=True) or os._exit(1)}, SHORT)
    assert worker("it", {"completions": ["a"]})[0].over_limit
    assert capfd.readouterr().out == "before the end\n"


def test_escapes_of_a_print_are_shown_and_not_obeyed(capfd):
    worker = RuleWorker({"it": lambda completions: print(completions[0]) or [0.0]}, SHORT)
    worker("it", {"completions": ["a\tü\u3000ー\n\x1b]0;x\x07\x9b31m\u202e\r"]})
    assert capfd.readouterr().out == "a\tü\u3000ー\n\\x1b]0;x\\x07\\x9b31m\\u202e\n"


def test_a_keeper_that_is_ended_while_it_forks_ends_without_a_word(capfd):
    def end_at_next_fork():
        os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), END))

    worker = RuleWorker({"it": warmed_up_by(end_at_next_fork)(lambda completions: [0.0])}, SHORT)
    assert worker._connection.poll(10) and worker._stop() == 0
    assert capfd.readouterr() == ("", "")


# Secrets


@pytest.mark.slow
def test_a_rule_and_its_programs_see_no_secret_variables():
    names = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SESSION", "PGPASSWORD", "MY_SECRET_2", "DB_URL"]
    code = """
import os, subprocess, sys
from common.rewards.worker import Limits, RuleWorker
def looks(completions):
    import posix
    print(sorted(name for name in os.environ if "hidden" in os.environ[name]))
    print(subprocess.run(["env"], capture_output=True, text=True).stdout.count("hidden"))
    print(open("/proc/self/environ").read().count("hidden"), str(posix.environ).count("hidden"))
    return [1.0]
RuleWorker({"looks": looks}, Limits())("looks", {"completions": ["a"]})
print(sum("hidden" in value for value in os.environ.values()))
"""
    given = dict.fromkeys(names, "hidden") | {"DB_URL": "postgres://me:hidden@host/db", "PLAIN": "hidden, not"}
    done = script(code, env=os.environ | given)
    assert done.stdout.splitlines() == ["['PLAIN']", "1", "1 1", str(len(given))], done.stderr


def test_which_variables_are_secrets():
    secret = "HF_TOKEN hf_token API_TOKENS TOKEN_2 OPENAI_API_KEY SSH_AUTH_SOCK MYSQL_PWD KAGGLE_KEY AWS_REGION GH_PAT"
    plain = "PATH PWD OLDPWD HOME MAX_TOKENS TOKENIZERS_PARALLELISM MONKEY AUTHOR CUDA_VISIBLE_DEVICES"
    assert all(is_secret(name, "x") for name in secret.split())
    assert not any(is_secret(name, "x") for name in plain.split())
    assert is_secret("HTTPS_PROXY", "http://me:pass@host:80") and not is_secret("HTTPS_PROXY", "http://host:80")


# Rows without a score


def steps(rows: LostRows, *each: tuple[int, int]) -> None:
    """Steps with so many lost rows of so many."""
    for step, (lost, of) in enumerate(each, 1):
        rows.add("rewards", {"slow": Lost(lost, of, float(lost), "why")})
        rows.end_step(step)


def lost_rows(sum_over_processes=lambda counts: counts) -> LostRows:
    return LostRows({"rewards": ["slow"], "lenient": ["slow"]}, sum_over_processes=sum_over_processes, says=True)


def test_most_rows_of_a_step_over_the_limit_are_a_warning_with_its_cost(caplog):
    steps(lost_rows(), (8, 16))
    assert not caplog.records
    steps(lost_rows(), (9, 16))
    assert (
        "step 1: 9 of 16 rows of the rule 'slow' were over a limit (the last one: why): they took 9 s" in caplog.text
    )
    assert "3,000 such rows take 50 minutes" in caplog.text


def test_few_rows_over_the_limit_in_five_steps_running_are_one_warning(caplog):
    steps(lost_rows(), (1, 16), (1, 16), (0, 16), (1, 16), (1, 16), (1, 16), (1, 16))
    assert not caplog.records
    steps(lost_rows(), *[(1, 16)] * 20)
    assert len(caplog.records) == 1
    assert "steps 1 to 5: " in caplog.text and "were 5 rows, which took 5 s" in caplog.text


def test_all_rows_of_two_steps_running_are_an_error_before_the_second_is_trained_on():
    steps(lost_rows(), (16, 16), (15, 16), (16, 16))
    with pytest.raises(ValueError, match=r"all 16 rows of the rule 'slow' .* as in step 1 \(the last one: why\)"):
        steps(lost_rows(), (16, 16), (16, 16))


def test_rows_of_other_processes_count():
    asked = []

    def with_others(counts):
        asked.append(counts.tolist())
        return counts + torch.tensor([0.0, 4.0, 0.0])

    steps(lost_rows(with_others), (4, 4), (4, 4))
    ends = [[[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]] * 2
    assert asked == ends  # a step in which no row has a score, which every process knows, would be asked of sooner
    with pytest.raises(ValueError, match=r"all 20 rows"):  # on a process without rows too
        steps(lost_rows(lambda counts: counts + 20), (4, 4), (0, 0))


def test_a_rule_of_the_same_name_in_another_scorer_hides_no_lost_rows():
    rows = lost_rows()
    for step in (1, 2):
        with pytest.raises(ValueError, match="as in step 1") if step == 2 else contextlib.nullcontext():
            rows.add("rewards", {"slow": Lost(4, 4)})
        rows.add("lenient", {"slow": Lost(0, 4)})
        rows.end_step(step)


def test_an_evaluation_without_a_score_is_an_error(caplog):
    judge_evaluation({"slow": Lost(2, 4, 2.0, "why")})
    assert not caplog.records
    judge_evaluation({"slow": Lost(3, 4, 3.0, "why")})
    assert "3 of 4 rows of the rule 'slow'" in caplog.text
    with pytest.raises(ValueError, match=r"all 4 rows of the rule 'slow' .*say nothing about the model"):
        judge_evaluation({"slow": Lost(4, 4, 4.0, "why")})


@pytest.mark.slow
def test_a_run_whose_rule_scores_nothing_stops_in_its_second_step(tiny_folder, tmp_path, caplog):
    task = toy_task()
    task.rewards["dies"] = rule(lambda completions, **_: os._exit(3))
    task.reward_weights["dies"] = 1.0
    config = toy_config(tiny_folder, tmp_path / "run", num_steps=5)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match=r"all 16 rows of the rule 'dies'.*status 3"),
    ):
        algorithms()["GRPO"].trainer(config, task=task).train()
    [first] = metrics_of(tmp_path / "run")
    assert first["over_limit/dies"] == 16 and not any("lost" in name for name in first)
    assert "step 1: all 16 rows of the rule 'dies'" in caplog.text


@pytest.mark.slow
def test_a_script_ends_with_a_message_and_status_2(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\nfrom common.rewards.rules import rule\n@rule\ndef dies(completions):\n    os._exit(3)\n"
    )
    settings = "--num_steps 4 --prompts_per_step 2 --num_generations 2 --eval_every 0 --sampler transformers"
    words = ["grpo.py", *settings.split(), "--reward", f"{tmp_path}/mine.py:dies", "--output_dir", tmp_path / "run"]
    done = run_forked(words, cwd=ROOT / "GRPO")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert "all 4 rows of the rule 'dies' were over a limit, as in step 1" in error and len(error.splitlines()) <= 8
