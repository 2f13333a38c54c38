"""Lets judges that no run was trained on score the runs: `--judge`.

The untrained policy and the final model of each run answer the held-out prompts once, by
`python -m common.evaluation`. The reward that the runs were trained on and every judge score the same completions.
What is there is not measured again, and for a further judge nothing is sampled.
"""

import sys
import threading
import time
from pathlib import Path
from typing import Any

from common.cli import as_arguments
from common.evaluation.command import Evaluation
from common.evaluation.settings import EvaluationSettings
from common.rewards.choose import is_reward_model, make_scorer
from common.runs.checkpoints import FINAL_FOLDER
from common.runs.prompt_record import time_of_run
from common.terminal import one_line
from examples.compare_algorithms.judged import TRAINING, UNTRAINED, judged_folder, mean_score
from examples.compare_algorithms.processes import Processes, last_line
from examples.compare_algorithms.runs import FinishedRun, run_folder

# Settings that an evaluation has under the names of a run, and those that a run has for its evaluations.
SAME = (
    *("task", "dataset", "dataset_split", "prompt_file", "enable_thinking", "trust_remote_code"),
    *("reward_format", "reward_time_limit", "reward_memory_limit"),
    *("max_prompt_length", "max_completion_length", "sampler", "dtype", "vllm_max_num_seqs"),
)
OF_EVALUATION = ("num_samples", "temperature", "top_p", "top_k")
# Of all judged completions, whatever the seed of a run: the untrained policy answers once.
SEED = 0


class Judging:
    """Scores of the runs of one comparison by its training reward and by judges.

    Args:
        output_dir: of the comparison.
        judges: folders or hub ids of reward models, file.py:function or module:function.

    Raises:
        ValueError: a judge cannot be one, or two have the same name.
    """

    def __init__(self, output_dir: Path, judges: list[str]) -> None:
        self.output_dir = output_dir
        self.judges: dict[str, str] = {}
        for given in judges:
            name = _absolute(given)
            (label,) = make_scorer({}, {}, names=[name], weights=None).functions
            if label == TRAINING or self.judges.setdefault(label, name) != name:
                raise ValueError(
                    f"judge={given}: {'the reward of training' if label == TRAINING else 'another judge'} has the "
                    f"name {label!r} too, and the tables tell judges apart by their names. Rename its folder or "
                    "function."
                )
        self._lock = threading.Lock()

    def judge(self, run: FinishedRun, processes: Processes) -> tuple[str, bool]:
        """Measure what is missing of a run, and of the untrained policy.

        Args:
            run: a finished run.
            processes: starts the evaluations.

        Returns:
            What came of it, in words, and whether all is there.
        """
        start, own = time.monotonic(), run_folder(self.output_dir, run.algorithm, run.seed)
        try:
            with self._lock:  # of runs side by side, one has the untrained policy answer, and the others wait
                self._measure(UNTRAINED, run.settings["model"], run, processes)
            self._measure(own.name, str(own / FINAL_FOLDER), run, processes)
        except (ValueError, ChildProcessError) as error:
            return f"judging FAILED: {one_line(str(error), 1000)}", False
        scores = {
            label: [mean_score(judged_folder(self.output_dir, who, label)) for who in (UNTRAINED, own.name)]
            for label in (TRAINING, *self.judges)
        }
        shown = ", ".join(f"{label} {before:.3f} -> {after:.3f}" for label, (before, after) in scores.items())
        return f"judged in {time.monotonic() - start:.0f} s: {shown}", True

    def _measure(self, who: str, model: str, run: FinishedRun, processes: Processes) -> None:
        """Have one model scored by the training reward and by every judge."""
        trained_on = {"rewards": run.settings["rewards"], "reward_weights": run.settings["reward_weights"]}
        self._check_new(trained_on["rewards"] or ())
        rewards = {TRAINING: trained_on} | {label: {"rewards": [name]} for label, name in self.judges.items()}
        for label, chosen in rewards.items():
            folder = judged_folder(self.output_dir, who, label)
            settings = EvaluationSettings(model=[model], output_dir=str(folder), **chosen, **self._settings(run))
            folder.parent.mkdir(parents=True, exist_ok=True)
            if Evaluation(settings).stored() is not None:
                continue
            log = folder.with_suffix(".log")
            status = processes.run([sys.executable, "-m", "common.evaluation", *as_arguments(vars(settings))], log)
            if status:
                raise ChildProcessError(f"{label} ended with status {status}, see {log}: {last_line(log)}")

    def _settings(self, run: FinishedRun) -> dict[str, Any]:
        """How completions are sampled: as in the evaluations of the run."""
        of_run = run.settings
        began = time_of_run(run_folder(self.output_dir, run.algorithm, run.seed))
        return {
            **{name: of_run[name] for name in SAME},
            **{name: of_run[f"eval_{name}"] for name in OF_EVALUATION},
            "num_held_out": of_run["num_eval_prompts"],
            "seed": SEED,
            "date": began and began.isoformat(),
            "keep_completions": True,
        }

    def _check_new(self, trained_on: list[str] | tuple[str, ...]) -> None:
        """Refuse a judge that the runs were trained on."""
        for label, name in self.judges.items():
            if name in map(_absolute, trained_on):
                raise ValueError(
                    f"judge {label}: the runs were trained on it, so it cannot tell whether they became better or "
                    "learned to please it. Pass --judge with a reward that training did not have, such as a reward "
                    "model of another seed."
                )


def _absolute(name: str) -> str:
    """The name of a reward, the same wherever it is typed."""
    if is_reward_model(name):
        return str(Path(name).resolve()) if Path(name).is_dir() else name
    place, colon, function = name.rpartition(":")
    return f"{Path(place).resolve()}:{function}" if colon and place.endswith(".py") else name
