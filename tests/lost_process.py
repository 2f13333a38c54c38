"""A toy run one of whose processes dies or hangs; test_lost_process.py starts it by torchrun.

Arguments: model, folder, settings as JSON, seconds for which a process waits for another one, and what happens in each
attempt of the launcher: SIGNAL:RANK:STEP:PLACE, or "-" for nothing. The process sends itself the signal at the step,
before it is sampled, in its update, or in loading.
"""

import json
import os
import signal
import sys
from pathlib import Path

import common.config
from common.cli import run_script
from common.runs.outcome import how_to_continue
from common.runs.run import Run
from common.start import report
from tests.toy import algorithms, toy_config, toy_task

model, folder, settings, seconds, *attempts = sys.argv[1:]
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
event = attempts[attempt] if attempt < len(attempts) else "-"
name, rank, step, place = event.split(":") if event != "-" else ("", "-1", "-1", "")
is_own = os.environ.get("RANK", "0") == rank


def hit() -> None:
    print(f"{name} in attempt {attempt} for {os.getpid()}", flush=True)
    os.kill(os.getpid(), getattr(signal, name))


def main() -> None:
    if is_own and place == "loading":
        is_ready = Run.check_prompts
        Run.check_prompts = lambda self, record: (hit(), is_ready(self, record))
    trainer = algorithms()["GRPO"].trainer(config, task=toy_task())
    if is_own and place != "loading":
        places = {"sampling": (trainer.policy_sampler, "sample"), "update": (trainer.policy, "optimizer_step")}
        owner, method = places[place]
        usual = getattr(owner, method)

        def once(*args: object, **options: object) -> object:
            if trainer.current_step == int(step):
                setattr(owner, method, usual)
                hit()
            return usual(*args, **options)

        setattr(owner, method, once)
    report(trainer)


common.config._SHORTEST_TIMEOUT = 0.0  # a minute, for users, is long for a test
settings = json.loads(settings) | {"process_timeout": float(seconds) / 60}
config = toy_config(Path(model), Path(folder), **settings)
run_script(main, interrupted=lambda: how_to_continue(Path(folder), config))
