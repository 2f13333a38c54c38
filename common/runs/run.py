"""Run: a run's folder, its log and its checkpoints, as the trainer sees them.

log.py, checkpoints.py and plots.py say what the files contain; this module decides when they are written.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypedDict

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.config import RLConfig
from common.mistakes import WrongNumbers
from common.models.outputs import restore_outputs
from common.models.saving import save_model
from common.rollouts import Rollouts
from common.runs import checkpoints
from common.runs.best import better_checkpoint, link_best, restore_best
from common.runs.folder import MAY_CHANGE, has_begun, prepare_run_folder, stored_settings
from common.runs.hub import prepare_upload, upload
from common.runs.log import RunLog, json_line
from common.runs.outcome import describe_outcome, length_matters
from common.runs.plots import draw_curves
from common.runs.progress import Progress
from common.runs.prompt_record import Record, check_processes_agree, check_record
from common.runs.stopping import Stopping
from common.signals import name_of
from common.update.learner import Learner

logger = logging.getLogger("nanorlhf")

# Rows of each entry in samples.jsonl: enough to read, few enough to store every few steps.
NUM_SAMPLES = 8


class Unfinished(TypedDict):
    """What a step has left behind that was stopped between its update and the end of its evaluation.

    Attributes:
        measured: see StepMetrics.gather.
        samples: names of tables, and their rows.
    """

    measured: list[dict[str, float]]
    samples: list[tuple[str, list[dict]]]


class Run:
    """The folder of one run, new or continued.

    Args:
        config: the run's settings.
        accelerator: the main process writes, the others only read.
        algorithm: its name, for the folder's name.

    Attributes:
        folder: path of the folder.
        checkpoint: what to continue from, None at the beginning.
        is_new: nothing of it was there before.
        first_step: the next step to do, from 1.
        unfinished: what the step of the checkpoint has measured, if its evaluation and its line are still to be done.
        stopping: what signals ask for.
        stopped_early: early stopping has ended the run.

    Raises:
        ValueError: if the folder is another run's, or a finished one, or the hub does not take its final model.
    """

    def __init__(self, config: RLConfig, accelerator: Accelerator, *, algorithm: str) -> None:
        self.config = config
        self.accelerator = accelerator
        self.folder = run_folder(config, algorithm)
        self.is_new = not has_begun(self.folder)
        has_upload = config.push_to_hub and accelerator.is_main_process
        self._repository = prepare_upload(config.push_to_hub) if has_upload else None
        # Only the main process decides, since a damaged file could be seen by one process and not by another.
        found = [self._prepare() if accelerator.is_main_process else None]
        self.checkpoint, state = broadcast_object_list(found)[0]
        self.first_step = state["step"] + 1
        self.best: dict | None = state.get("best")
        self._evaluations_since_best: int = state.get("evaluations_since_best", 0)
        self._counts: dict[str, int] = {name: state.get(name, 0) for name in ("episodes", "tokens")}
        # A checkpoint of this step, with what it says, can be written until the next update begins.
        self._saved_as, self._state = state["step"], state
        self.unfinished: Unfinished | None = state.get("unfinished")
        self._samples: list[tuple[str, list[dict]]] = []  # of the step
        self.stopping = Stopping(config.stop_grace, accelerator, keeps_checkpoint=bool(config.save_every))
        self._learners: dict[str, tuple[Learner, nn.Module]] = {}
        self._exports: dict[str, Callable[[Path], None]] = {}
        self._log: RunLog | None = None
        self._progress: Progress | None = None

    def _prepare(self) -> tuple[Path | None, dict]:
        """Make the folder, or find the checkpoint to continue from and its state, with a best that is there."""
        config, folder = self.config, self.folder
        before = stored_settings(folder).get("num_steps", config.num_steps)
        options = {"length_matters": length_matters(config), "notes": config.notes}
        checkpoint = prepare_run_folder(folder, asdict(config), config.resume, **options)
        state = checkpoints.load_state(checkpoint) if checkpoint else {"step": 0}
        state["best"], said = restore_best(folder, state.get("best"), state["step"])
        link_best(folder, state["best"])
        if said:
            logger.warning("%s: %s", folder, said)
        if checkpoint and before < config.num_steps and length_matters(config):
            step = state["step"]
            rates = [replace(config, num_steps=before).scheduled_rate(step)]
            rates += [config.scheduled_rate(each) for each in (step + 1, config.num_steps)]
            logger.info(
                "extended from %d to %d steps: the learning rate was %.3g at step %d; it goes on with %.3g and "
                "reaches %.3g at step %d, as lr_scheduler=%s has it in a run of that length",
                *(before, config.num_steps, rates[0], step, rates[1], rates[2], config.num_steps, config.lr_scheduler),
            )
        return checkpoint, state

    def check_prompts(self, record: Record) -> None:
        """Keep the record of a new run's prompts; refuse to continue a run with others.

        Args:
            record: of the prompts as they are now.

        Raises:
            ValueError: says what differs, between now and the start or between processes.
        """
        check_processes_agree(record, self.accelerator)
        if self.accelerator.is_main_process:
            check_record(self.folder, record, is_new=self.is_new)
        self.accelerator.wait_for_everyone()

    @property
    def stopped_early(self) -> bool:
        """True after early_stopping_patience evaluations without a new best."""
        patience = self.config.early_stopping_patience
        return bool(patience) and self._evaluations_since_best >= patience

    def __enter__(self) -> "Run":
        """Open log and progress bar, and drop the lines that a killed run wrote after its last checkpoint."""
        is_main, config = self.accelerator.is_main_process, self.config
        self._log = RunLog(self.folder, self.accelerator, asdict(config))
        last = self.first_step - 2 if self.unfinished else self.first_step - 1
        self._log.rewind(last if self.checkpoint else -1)
        for table, rows in (self.unfinished or {}).get("samples", []):
            self._log_samples(self.first_step - 1, rows, table=table)
        self._progress = Progress(config.num_steps, start=self.first_step - 1, enabled=config.progress and is_main)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        """Close them and draw the curves, even after an error."""
        self._progress.close()
        self._log.close()
        if self.accelerator.is_main_process:
            draw_curves(self.folder)
        if kind is WrongNumbers:  # of all processes: a launcher ends the others as soon as one has ended
            self.accelerator.wait_for_everyone()

    def restore(self, learner: Learner, module: nn.Module, save: Callable[[Path], None] | None = None) -> None:
        """Save a learner in every checkpoint from now on, and load its state from the one to continue from.

        The policy's weights are loaded with the policy; the trained weights of every other module are loaded here.

        Args:
            learner: what is trained.
            module: its model.
            save: writes the model into the folder final/<name>_model; None: it is not part of final/.
        """
        self._learners[learner.name] = (learner, module)
        if save is not None:
            self._exports[learner.name] = save
        if self.checkpoint is None:
            return
        learner.load_optimizer(checkpoints.load_tensors(self.checkpoint / f"{learner.name}_optimizer.pt"))
        if learner.name != "policy":
            weights = load_file(self.checkpoint / f"{learner.name}.safetensors")
            _, unknown = module.load_state_dict(weights, strict=False)  # frozen weights are not in the file
            assert not unknown and len(weights) == len(learner.parameters)

    def count(self, *, episodes: int = 0, tokens: int) -> None:
        """Add what was sampled for training, over all processes.

        Args:
            episodes: completions of a step's own prompts.
            tokens: completion tokens, of any other completions too.
        """
        self._counts["episodes"] += episodes
        self._counts["tokens"] += tokens

    def add_samples(self, step: int, split: str, rollouts: Rollouts, parts: dict[str, Tensor]) -> None:
        """Write the first few rows of a batch to samples.jsonl; outside `with run:` nothing is written.

        In training these are all completions of the first groups, to compare them. In evaluation it is one completion
        for each of the first held-out prompts, the same ones each time.

        Args:
            step: the step.
            split: "train" or "eval".
            rollouts: scored.
            parts: (B,) raw rewards by name.
        """
        if self._log is None:
            return
        every = self.config.eval_num_samples if split == "eval" else 1
        rows = [
            {
                "split": split,
                "prompt": rollouts.prompts[row],
                "completion": rollouts.completions[row],
                "score": float(rollouts.scores[row]),
                "parts": {name: float(part[row]) for name, part in parts.items()},
                "length": int(rollouts.lengths[row]),
                "truncated": bool(rollouts.truncated[row]),
                **(
                    {"extra": {name: values[row] for name, values in rollouts.extra.items()}} if rollouts.extra else {}
                ),
            }
            for row in range(0, len(rollouts), every)[:NUM_SAMPLES]
        ]
        self._log_samples(step, rows, table=f"samples/{split}")

    def _log_samples(self, step: int, rows: list[dict], *, table: str) -> None:
        self._samples.append((table, [json.loads(json_line(row)) for row in rows]))
        self._log.samples(step, rows, table=table)

    def begin_evaluation(self, step: int, measured: list[dict[str, float]]) -> None:
        """After the update of a step and before its evaluation: from here on, a checkpoint may be without its line.

        Args:
            step: the step.
            measured: so far, over all processes; see StepMetrics.gather.
        """
        unfinished = {"measured": measured, "samples": [*self._samples]}
        self._note_state(step, {"unfinished": unfinished})
        self.stopping.leave_if_asked()

    def _note_state(self, step: int, more: dict | None = None) -> None:
        """Keep what a checkpoint of this step says, since counters go on in the next one."""
        kept = {"best": self.best, "evaluations_since_best": self._evaluations_since_best}
        self._saved_as, self._state = step, kept | self._counts | (more or {})

    def end_step(self, step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
        """Write the step's line, and on evaluation steps note whether it is the best so far.

        Args:
            step: the step that has ended; 0 before training.
            metrics: global values.
            timings: time and memory of this process.
        """
        self._log.log(step, self._counts | metrics | timings)
        self._progress.update(step, metrics)
        metric = "eval/accuracy" if "eval/accuracy" in metrics else "eval/score"
        if metric in metrics:
            best = better_checkpoint(self.best, step, metric, metrics[metric])
            self._evaluations_since_best = 0 if best != self.best else self._evaluations_since_best + 1
            self.best = best
            if self.accelerator.is_main_process:
                draw_curves(self.folder)
        self._samples, self.unfinished = [], None
        self._note_state(step)

    def save_if_due(self, step: int, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """After the step's line is written: save a checkpoint every save_every steps, and one of every new best."""
        every = self.config.save_every
        is_new_best = self.best is not None and self.best["checkpoint"] == f"checkpoint-{step}"
        if not every or step == 0 or not (step % every == 0 or is_new_best):
            return
        if self.accelerator.is_main_process:
            self._save(tokenizer)
        self.accelerator.wait_for_everyone()

    def _save(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        checkpoints.save_checkpoint(self.folder, self._saved_as, writers=self._writers(tokenizer), state=self._state)
        link_best(self.folder, self.best)
        checkpoints.rotate(self.folder, self.config.save_total_limit, (self.best or {}).get("checkpoint"))

    def leave(self, tokenizer: transformers.PreTrainedTokenizerBase) -> NoReturn:
        """After StepLeft: save the last step whose update is done, and end.

        Raises:
            Stopped: or KeyboardInterrupt after Ctrl-C.
        """
        self.stopping.tell_others()
        if self.accelerator.is_main_process:
            step, name = self._saved_as, name_of(self.stopping.number)
            if self.config.save_every and step >= self.first_step:  # older ones are there
                self._save(tokenizer)
            latest = checkpoints.latest_checkpoint(self.folder) or "no checkpoint yet"
            logger.info("%s: left after step %d of %d; %s", name, step, self.config.num_steps, latest)
        self.stopping.wait_for_main()
        raise self.stopping.reason()

    def finish(self, step: int, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Write final/, the policy after the last step, and send it to the hub if asked."""
        if self.accelerator.is_main_process:
            policy = self._learners["policy"][1]

            def fill(folder: Path) -> None:
                save_model(policy, tokenizer, folder)
                for name, save in self._exports.items():
                    save(folder / f"{name}_model")

            patience = self.config.early_stopping_patience
            state = {"stopped_early": self.stopped_early, "early_stopping_patience": patience, "best": self.best}
            checkpoints.save_final(self.folder, step, fill=fill, **state)
            if self._repository is not None:
                upload(self._repository, self.folder / checkpoints.FINAL_FOLDER)
        self.accelerator.wait_for_everyone()

    def outcome(self, num_eval_prompts: int) -> list[str]:
        """Lines about a finished run: the held-out metric before and after, where its models are, how to go on."""
        return describe_outcome(self.folder, self.config, self.best, num_eval_prompts)

    def _writers(self, tokenizer: transformers.PreTrainedTokenizerBase) -> dict:
        writers = {}
        for name, (learner, module) in self._learners.items():
            writers[f"{name}_optimizer.pt"] = lambda path, learner=learner: checkpoints.save_tensors(
                learner.optimizer.state_dict(), path
            )
            if name == checkpoints.POLICY_FOLDER:
                writers[name] = lambda path, module=module: _save_trainable(
                    module, tokenizer, path, use_lora=self.config.use_lora
                )
            else:
                writers[f"{name}.safetensors"] = lambda path, learner=learner, module=module: save_file(
                    _trained_weights(learner, module), path
                )
        return writers


def algorithm_name(trainer: type) -> str:
    """The algorithm's name, from that of its trainer."""
    return trainer.__name__.removesuffix("Trainer")


def run_folder(config: RLConfig, algorithm: str) -> Path:
    """The folder that the settings name, or one below runs/ with a name made of them."""
    return Path(config.output_dir or Path("runs") / default_name(config, algorithm))


def default_name(config: RLConfig, algorithm: str) -> str:
    """Name of a run's folder: the same settings give the same folder, so the same command continues a run."""
    compared = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    digest = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:6]
    return f"{algorithm.lower()}-{config.task}-seed{config.seed}-{digest}"


def _trained_weights(learner: Learner, module: nn.Module) -> dict[str, Tensor]:
    trained = set(learner.parameters)
    named = module.named_parameters()
    return {name: parameter.detach().contiguous() for name, parameter in named if parameter in trained}


def _save_trainable(
    module: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path, *, use_lora: bool
) -> None:
    """Write the policy as transformers or peft loads it; with LoRA, only the adapter."""
    with torch.no_grad():
        adapters = {"selected_adapters": ["default"]} if use_lora else {}
        module.save_pretrained(folder, **adapters)
    if not use_lora:
        restore_outputs(module, folder)
    tokenizer.save_pretrained(folder)
