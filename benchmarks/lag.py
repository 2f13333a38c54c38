"""How much a lag saves where sampler and trainer have a core each: `taskset -c 0,1 python -m benchmarks.lag`.

A server of vLLM has one of the cores that this process may use, the trainer the other. Runs of the embedded GRPO
without and with a lag take turns, each in a process of its own, at a learning rate that leaves the policy as it is: so
they all sample and train the same amount. Of each step the phases of metrics.jsonl count.

    without a lag a step takes sample + rest; with one, at best the longer of the two
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = ["--preset", "cpu", "--learning_rate", "1e-9", "--eval_every", "0", "--save_every", "0"]
# The first steps: threads and caches begin, and with a lag the first one samples twice.
LEFT_OUT = 2
LONGEST_START = 300.0


def command_of(url: str, core: int, *more: str) -> list[str]:
    """The script on one core."""
    script = ["GRPO/grpo.py", *SETTINGS, "--sampler", "vllm_server", "--sampler_url", url, *more]
    return ["taskset", "-c", str(core), sys.executable, *script]


def start_server(core: int, log: Path) -> tuple[subprocess.Popen, str]:
    """A server on one core, once it serves, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command_of(url, core, "--serve"),
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    end = time.monotonic() + LONGEST_START
    while "serving " not in log.read_text("utf-8"):
        if process.poll() is not None or time.monotonic() > end:
            sys.exit(f"the server did not start:\n{log.read_text('utf-8')[-3000:]}")
        time.sleep(0.2)
    return process, url


def steps_of(url: str, core: int, folder: Path, *, lag: int, num_steps: int) -> list[dict]:
    """Lines of a run's metrics."""
    more = ["--sampling_lag", str(lag), "--num_steps", str(num_steps), "--output_dir", str(folder)]
    done = subprocess.run(
        command_of(url, core, *more, "--progress", "false"),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines][LEFT_OUT : num_steps - 1]  # the last one samples nothing


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def main() -> None:
    """Print a line for each round, and the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("one core only: the server and the trainer need one each. Pass two by taskset -c 0,1.")
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server, url = start_server(cores[0], folder / "server.log")
        try:
            print("| round | lag 0: sample, s | rest, s | lag 1: step, s | faster | possible | share |", flush=True)
            print("|---|---|---|---|---|---|---|", flush=True)
            for number in range(arguments.rounds):
                found = {}
                for lag in (0, 1):
                    place = folder / f"{number}-{lag}"
                    found[lag] = steps_of(url, cores[1], place, lag=lag, num_steps=arguments.steps)
                sample, step, lagged = (
                    statistics.median(line[name] for line in found[lag])
                    for name, lag in (("time/sample", 0), ("time/step", 0), ("time/step", 1))
                )
                rest = step - sample
                faster, possible = step / lagged, step / max(sample, rest)
                rounds.append(faster / possible)
                values = (sample, rest, lagged, faster, possible, faster / possible)
                print(f"| {number + 1} | {' | '.join(f'{value:.2f}' for value in values)} |", flush=True)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    print(f"median share of the possible: {statistics.median(rounds):.2f}")


if __name__ == "__main__":
    main()
