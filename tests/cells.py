"""One cell of the table in docs/models.md: an architecture, trained for two steps in one mode, and what came of it.

`python -m tests.cells FOLDER` reads a line `architecture mode` at a time and answers each with a line of JSON. It has
imported everything once; each cell runs in a fork of it, so that a crash costs one cell, and nothing that one engine
leaves behind reaches the next.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.mistakes import WRONG_NUMBERS

ROOT = Path(__file__).parent.parent

# Mode -> settings that differ. The order is that of the columns.
MODES: dict[str, dict[str, Any]] = {
    "vllm": {"sampler": "vllm"},
    "vllm-lora": {"sampler": "vllm", "use_lora": True, "lora_r": 4},
    "transformers": {"sampler": "transformers"},
    "transformers-lora": {"sampler": "transformers", "use_lora": True, "lora_r": 4},
}
# float32: mean difference of log-probs between sampler and trainer, and logits of what was saved from the policy's.
MAX_LOGPROB_DIFF, MAX_LOGIT_DIFF, MAX_RATIO_ERROR = 1e-5, 5e-5, 1e-6
# Of the largest difference between logits in float32 and in float64: two ways to compute the same may differ by more
# than MAX_LOGIT_DIFF where that is large, as in Nemotron, whose activation is a square.
MAX_OF_ROUNDING = 4
MAX_REFUSAL_LINES, COLUMNS = 8, 119
# Models that a run saves.
FOLDERS = ("final", "merged")
TIME_LIMIT = 240  # seconds of a cell; it takes 2 to 5 on a free core
# About 500 tokens, one a character: longer than every window, and than the original length of longrope.
PROMPTS = [" ".join(f"{a * b % 97} and {a} make {b};" for b in range(1, 30)) for a in range(3, 9)]


@dataclass(kw_only=True)
class Cell:
    """What came of an architecture in a mode.

    Attributes:
        verdict: "right", "refused" or "WRONG".
        reason: why it is refused or wrong; empty if it is right.
        logprob_diff: the larger of the two steps' mean differences; None if no step was done.
        logit_diff: of final/, and with LoRA of the merged adapter too, from the policy; None if not reached.
        seconds: wall-clock.
    """

    verdict: str
    reason: str = ""
    logprob_diff: float | None = None
    logit_diff: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        """The cell in the table."""
        if self.verdict == "right":
            return f"{self.logprob_diff:.1e}"
        return f"{self.verdict}: {self.reason}"


class Cells:
    """A process that measures cells one after another. A context manager.

    Args:
        folder: for models and runs; models that are there are used again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Cells:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cells", str(self._folder)],
            **{"cwd": ROOT, "env": environment, "text": True},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(TIME_LIMIT)

    def measure(self, architecture: str, mode: str) -> Cell:
        """Train and compare.

        Args:
            architecture: key of ARCHITECTURES.
            mode: key of MODES.
        """
        print(architecture, mode, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that measures ended with {self._process.wait()} at {architecture} {mode}")
        return Cell(**json.loads(answer))


def noisy(prompts: list[str], completions: list[str], **_: list) -> list[float]:
    """A score that varies on random text."""
    return [zlib.crc32(text.encode()) % 100 / 100 for text in completions]


# What follows runs in the process that measures


def serve(folder: Path) -> None:
    """Measure what is asked for on standard input."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _import_everything()
    for line in sys.stdin:
        print(json.dumps(vars(_measure(folder, *line.split()))), file=answers, flush=True)


def _import_everything() -> None:
    import importlib

    import torch
    import vllm.model_executor.models.registry as registry

    for name in ("common.merge", "GRPO.grpo_trainer", "peft", "tests.architectures", "vllm.entrypoints.llm"):
        importlib.import_module(name)
    for name in ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "matplotlib.pyplot", "common.runs.run"):
        importlib.import_module(name)
    # vLLM looks at a model's class in a process of its own, which imports torch again: five seconds a cell.
    registry._run_in_subprocess = lambda look: look()
    sys.modules["common.runs.run"].draw_curves = lambda folder: None
    torch.set_num_threads(1)


def _measure(folder: Path, architecture: str, mode: str) -> Cell:
    """Measure a cell in a fork, within its time."""
    run = folder / f"{architecture}-{mode}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _in_fork(folder / "models" / architecture, architecture, mode, run)
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() - start < TIME_LIMIT:
        time.sleep(0.05)
    if status == (0, 0):
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)
    result = run / "cell.json"
    found = json.loads(result.read_text()) if result.exists() else {"exit": f"killed, status {status[1]}"}
    cell = judge(found, (run / "output.txt").read_text(errors="replace"))
    for path in (f"{run}/", f"{folder}/models/"):  # the table is the same wherever it was measured
        cell.reason = cell.reason.replace(path, "")
    cell.seconds = round(time.monotonic() - start, 1)
    for large in ("run", "merged"):
        shutil.rmtree(run / large, ignore_errors=True)
    return cell


def _in_fork(model: Path, architecture: str, mode: str, run: Path) -> None:
    output = os.open(run / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    found: dict[str, Any] = {}
    try:
        from tests.architectures import make

        if not (model / "config.json").exists():
            make(architecture, model)
        _train(model, mode, run, found)
        found["exit"] = 0
    except SystemExit as end:
        found["exit"] = end.code
    except BaseException as error:
        traceback.print_exc()
        found["exit"] = f"{type(error).__name__}: {error}"
    (run / "cell.json").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without what libraries do at the end


def _train(model: Path, mode: str, run: Path, found: dict[str, Any]) -> None:
    """Train as a script does, and compare what was saved with the policy; `found` gets what was measured so far."""
    import transformers

    from common.cli import run_script
    from common.tasks import Task
    from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer

    load = transformers.PreTrainedModel.from_pretrained.__func__

    def noted(cls: type, *args: Any, **options: Any) -> Any:
        if options.get("device_map") != {"": "meta"}:  # that reads names and shapes only
            found["loaded"] = True
        return load(cls, *args, **options)

    transformers.PreTrainedModel.from_pretrained = classmethod(noted)
    task = Task(train=[{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS], rewards={"noisy": noisy})

    def train() -> None:
        config = GRPOConfig(
            **{"model": str(model), "output_dir": str(run / "run"), "dtype": "float32", **MODES[mode]},
            **{"num_steps": 2, "prompts_per_step": 2, "num_generations": 4, "num_minibatches": 1, "seed": 1},
            **{"max_prompt_length": 700, "max_completion_length": 16, "learning_rate": 5e-3, "kl_coef": 0.01},
            **{"warmup_steps": 0, "eval_every": 0, "save_every": 0, "samples_every": 1, "progress": False},
            **{"vllm_max_num_seqs": 8, "vllm_memory_share": 0.05} if mode.startswith("vllm") else {},
        )
        trainer = GRPOTrainer(config, task=task)
        try:
            trainer.train()
        finally:
            metrics = run / "run" / "metrics.jsonl"
            lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            names = {"diff": "sampler/logprob_diff", "ratio": "policy/first_ratio", "kl": "kl"}
            names["gradient"] = "policy/grad_norm"
            found.update({key: [line.get(name) for line in lines] for key, name in names.items()})
        _compare(trainer, model, run, found)

    run_script(train)


def _compare(trainer: Any, model: Path, run: Path, found: dict[str, Any]) -> None:
    """Logits of final/ and of the merged adapter against those of the policy."""
    import torch
    import transformers

    from common.merge import MergeSettings, merge
    from common.models.attention import why_not
    from common.models.configs import model_class
    from common.models.outputs import use_plain_outputs
    from common.models.ties import settle_ties

    ids = torch.randint(20, 200, (2, 60), generator=torch.Generator().manual_seed(3))
    with trainer.models.use("policy") as policy, torch.no_grad():
        policy.eval()
        wanted = policy(input_ids=ids).logits
    folders = {"final": run / "run" / "final"}
    if trainer.config.use_lora:
        folders["merged"] = run / "merged"
        adapter = folders["final"] / "adapter"
        merge(MergeSettings(model=str(model), adapter=str(adapter), output=str(folders["merged"])))
    for name, folder in folders.items():
        # Eager attention leaves nothing out, which sdpa may have; where it is wrong itself, sdpa is not.
        config = transformers.AutoConfig.from_pretrained(folder)
        use_plain_outputs(config)
        attention = "sdpa" if why_not("eager", config, model_class(config)) else "eager"
        saved, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
        settle_ties(saved)
        with torch.no_grad():
            found[name] = (saved.eval()(input_ids=ids).logits - wanted).abs().max().item()
            if found[name] > MAX_LOGIT_DIFF:
                rounded = saved(input_ids=ids).logits
                saved.set_experts_implementation("eager")  # the kernel for grouped experts has no float64
                found["rounding"] = (saved.double()(input_ids=ids).logits - rounded).abs().max().item()
        found[f"{name} misfits"] = sorted(str(key) for keys in loading.values() for key in keys)[:3]


def judge(found: dict[str, Any], output: str) -> Cell:
    """The verdict on what was measured.

    Args:
        found: exit, loaded, diff, ratio, kl, gradient, final, merged, rounding, as far as it came.
        output: what the run printed.
    """
    diffs, saved = found.get("diff", []), [found[name] for name in FOLDERS if name in found]
    measured = {"logprob_diff": _largest(diffs), "logit_diff": _largest(saved)}
    if found["exit"] == 2:
        return Cell(**_refusal(output, loaded=found.get("loaded", False)), **measured)
    if found["exit"] == WRONG_NUMBERS:
        return Cell(verdict="WRONG", reason=f"stopped: {_message(output)}"[:300], **measured)
    if found["exit"] != 0:
        return Cell(verdict="WRONG", reason=str(found["exit"]).strip().split("\n")[0][:300], **measured)
    limit = max(MAX_LOGIT_DIFF, MAX_OF_ROUNDING * found.get("rounding", 0.0))
    problems = [
        (len(diffs) == 2 and _within(measured["logprob_diff"], MAX_LOGPROB_DIFF), f"logprob_diff {_short(diffs)}"),
        (
            all(ratio and abs(ratio - 1) <= MAX_RATIO_ERROR for ratio in found["ratio"]),
            f"first ratio {_short(found['ratio'])}",
        ),
        (found["kl"][:1] == [0], f"KL at step 1 {_short(found['kl'][:1])}"),
        (all(norm and norm > 0 for norm in found["gradient"]), f"gradient {_short(found['gradient'])}"),
        *((_within(found[name], limit), f"{name} {found[name]:.1e}") for name in FOLDERS if name in found),
        *((not found[name], f"{name} {found[name]}") for name in found if name.endswith("misfits")),
    ]
    wrong = [text for is_fine, text in problems if not is_fine]
    return Cell(verdict="WRONG" if wrong else "right", reason=", ".join(wrong), **measured)


def _refusal(output: str, *, loaded: bool) -> dict[str, str]:
    """Verdict and reason of a run that ended with a message."""
    message = _message(output)
    num_lines = sum(len(textwrap.wrap(line, COLUMNS)) or 1 for line in message.splitlines())
    first = message.split("\n")[0]
    if loaded:
        return {"verdict": "WRONG", "reason": f"refused after weights were loaded: {first}"}
    if num_lines > MAX_REFUSAL_LINES:
        return {"verdict": "WRONG", "reason": f"refused in {num_lines} lines: {first}"}
    return {"verdict": "refused", "reason": first}


def _message(output: str) -> str:
    return output[output.rfind("error: ") :].strip().removeprefix("error: ")


def _largest(values: list[float | None]) -> float | None:
    """The largest, NaN above all; None if there is none, or one was not measured."""
    return None if not values or None in values else max(values, key=lambda value: (math.isnan(value), value))


def _short(values: list[float | None]) -> str:
    return " and ".join("nothing" if value is None else f"{value:.5g}" for value in values)


def _within(value: float | None, bound: float) -> bool:
    return value is not None and value <= bound


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve(Path(sys.argv[1]).resolve())
    os._exit(0)  # what was imported takes seconds to end
