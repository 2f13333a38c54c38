"""Run: a run's folder, its log and its checkpoints, as the trainer sees them.

log.py, checkpoints.py and plots.py say what the files contain; this module decides when they are written.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
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
from common.mistakes import CannotWrite, TooLargeRow, WrongNumbers
from common.models.lora import save_adapter
from common.models.outputs import restore_outputs
from common.models.saving import save_model
from common.rollouts import Rollouts
from common.runs import checkpoints, ended
from common.runs.best import BEST_LINK, better_checkpoint, link_best, restore_best
from common.runs.disk import check_room, reached, written
from common.runs.folder import CONFIG_FILE, MAY_CHANGE, PROMPTS_FILE, has_begun, prepare_run_folder, stored_settings
from common.runs.held import HeldFolder, hold
from common.runs.hub import prepare_upload, upload
from common.runs.log import METRICS_FILE, RunLog, json_line, restore_metrics
from common.runs.outcome import describe_outcome, length_matters
from common.runs.plots import draw_curves
from common.runs.progress import Progress
from common.runs.prompt_record import Record, check_processes_agree, check_record
from common.runs.room import Sizes, sizes_of, warn_of_little_room
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
        plan: lines of the memory plan, for the top of a new run's config.yaml.

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

    def __init__(
        self, config: RLConfig, accelerator: Accelerator, *, algorithm: str, plan: Sequence[str] = ()
    ) -> None:
        self.config = config
        self._plan = plan
        self.accelerator = accelerator
        self.folder = run_folder(config, algorithm)
        self.is_new = not reached(self.folder, lambda: has_begun(self.folder))
        has_upload = config.push_to_hub and accelerator.is_main_process
        self._repository = prepare_upload(config.push_to_hub) if has_upload else None
        self._held: HeldFolder | None = None  # by the main process
        # Only the main process decides, since a damaged file could be seen by one process and not by another.
        found = [reached(self.folder, self._prepare) if accelerator.is_main_process else None]
        self.checkpoint, state = broadcast_object_list(found)[0]
        self.first_step = state["step"] + 1
        self.best: dict | None = state.get("best")
        self._samples_size: int | None = state.get("samples_size")
        self._evaluations_since_best: int = state.get("evaluations_since_best", 0)
        self._counts: dict[str, int] = {name: state.get(name, 0) for name in ("episodes", "tokens")}
        # A checkpoint of this step, with what it says, can be written until the next update begins.
        self._saved_as, self._state = state["step"], state
        self.unfinished: Unfinished | None = state.get("unfinished")
        self._samples: list[tuple[str, list[dict]]] = []  # of the step
        # The token budget that was found to fit, and the one that it replaces: another one is tried out anew.
        self._budget: dict | None = state.get("token_budget")
        options = {"keeps_checkpoint": bool(config.save_every), "process_timeout": config.process_timeout}
        self.stopping = Stopping(config.stop_grace, accelerator, **options)
        self._learners: dict[str, tuple[Learner, nn.Module]] = {}
        self._exports: dict[str, Callable[[Path], None]] = {}
        self._log: RunLog | None = None
        self._progress: Progress | None = None

    def _prepare(self) -> tuple[Path | None, dict]:
        """Make the folder, or find the checkpoint to continue from and its state, with a best that is there."""
        config, folder = self.config, self.folder
        before = stored_settings(folder).get("num_steps", config.num_steps)
        options = {"length_matters": length_matters(config), "notes": [*config.notes, *self._plan]}
        checkpoint = prepare_run_folder(folder, asdict(config), config.resume, run=self, **options)
        if last_end := ended.begin(folder):
            logger.warning("%s", last_end)
        self._held = hold(folder)
        self._held.keep(CONFIG_FILE)
        if checkpoint:
            restore_metrics(folder, checkpoint)
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
        self._on_main(lambda: self._check_record(record))

    def _check_record(self, record: Record) -> None:
        check_record(self.folder, record, is_new=self.is_new)
        self._held.keep(PROMPTS_FILE)

    def is_ready(self) -> None:
        """The trainer is made: from now on, no other one of this process gets the folder before this run has ended."""
        if self._held:
            self._held.is_ready = True

    def known_budget(self, at_start: int) -> int | None:
        """The token budget that an earlier process of the run found to fit, if it had begun with the same one.

        Args:
            at_start: what the settings say, or what the plan chose for this machine.
        """
        return self._budget["fits"] if self._budget and self._budget["at_start"] == at_start else None

    def note_budget(self, fits: int, at_start: int) -> None:
        """Keep a token budget, smaller than the one at the start, in every checkpoint from now on."""
        self._budget = {"at_start": at_start, "fits": fits}

    @property
    def stopped_early(self) -> bool:
        """True after early_stopping_patience evaluations without a new best."""
        patience = self.config.early_stopping_patience
        return bool(patience) and self._evaluations_since_best >= patience

    def __enter__(self) -> "Run":
        """Open log and progress bar, and drop the lines that a killed run wrote after its last checkpoint.

        Raises:
            ValueError: it has ended or failed, or this process was forked from the one that made it.
        """
        if self._log is not None:
            raise ValueError(
                f"output_dir={self.folder}: this trainer has trained already, and its run has ended or was "
                "interrupted. Make a new trainer: it continues from the last checkpoint."
            )
        if self._held and self._held.is_released:
            raise ValueError(
                f"output_dir={self.folder}: this process was forked from the one that made the trainer and that holds "
                "the folder, and two would damage each other's files. Make the trainer in the process that trains."
            )
        is_main, config = self.accelerator.is_main_process, self.config
        self._log = RunLog(self.folder, self.accelerator, asdict(config), self._held)
        last = self.first_step - 2 if self.unfinished else self.first_step - 1
        last = last if self.checkpoint else -1
        self._on_main(lambda: self._log.rewind(last, samples_size=self._samples_size))
        for table, rows in (self.unfinished or {}).get("samples", []):
            self._log_samples(self.first_step - 1, rows, table=table)
        if is_main:
            warn_of_little_room(self.folder, self._sizes(), config, first_step=self.first_step)
        self._progress = Progress(config.num_steps, start=self.first_step - 1, enabled=config.progress and is_main)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        """Close them and draw the curves, even after an error."""
        self._progress.close()
        self._log.close()
        lost = self._let_go(error) if self._held else None
        if kind in (WrongNumbers, CannotWrite, TooLargeRow) and self.stopping.number is None:
            # Of all processes: a launcher ends the others as soon as one ends.
            self.accelerator.wait_for_everyone()
        if lost:
            raise lost

    def _let_go(self, error: BaseException | None) -> CannotWrite | None:
        """Draw the curves and release the folder. If the folder is gone, that says more than an error of a writer."""
        try:
            if isinstance(error, Exception):
                self._held.check()
            if self._held.is_there() and not isinstance(error, CannotWrite):
                draw_curves(self.folder)
        except CannotWrite as gone:
            return gone
        finally:
            ended.end(self.folder)
            self._held.release()

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
        self._on_main(lambda: self._log.samples(step, rows, table=table))

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
        kept = {
            "best": self.best,
            "evaluations_since_best": self._evaluations_since_best,
            "samples_size": self._log.samples_size,
        }
        if self._budget:
            kept["token_budget"] = self._budget
        self._saved_as, self._state = step, kept | self._counts | (more or {})

    def end_step(self, step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
        """Write the step's line, and on evaluation steps note whether it is the best so far.

        Args:
            step: the step that has ended; 0 before training.
            metrics: global values.
            timings: time and memory of this process.
        """
        self._on_main(lambda: self._log.log(step, self._counts | metrics | timings))
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
        self._on_main(lambda: self._save(tokenizer))

    def _save(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Write the checkpoint of the last step whose update is done, and delete older ones."""
        config, sizes, best = self.config, self._sizes(), (self.best or {}).get("checkpoint")
        room = {"needed": sizes.checkpoint, "largest": sizes.largest, "drop_oldest": config.save_drop_oldest_first}
        checkpoints.make_room(self.folder, self._saved_as, best=best, **room)
        checkpoints.save_checkpoint(self.folder, self._saved_as, writers=self._writers(tokenizer), state=self._state)
        written(self.folder / BEST_LINK, lambda: link_best(self.folder, self.best))
        checkpoints.rotate(self.folder, config.save_total_limit, best)

    def leave(self, tokenizer: transformers.PreTrainedTokenizerBase) -> NoReturn:
        """After StepLeft: save the last step whose update is done, and end.

        Raises:
            Stopped: or KeyboardInterrupt after Ctrl-C.
            LostProcess: if the step was left because another process is gone.
            CannotWrite: in the main process, if the disk does not take the checkpoint.
        """
        self.stopping.tell_others()
        is_lost = self.stopping.is_lost
        try:
            if self.accelerator.is_main_process:
                step, name = self._saved_as, name_of(self.stopping.number)
                has_all = self.config.shard == "none" or not is_lost  # else a part of each tensor is gone
                if self.config.save_every and step >= self.first_step and has_all:  # older ones are there
                    reached(self.folder, lambda: self._save(tokenizer))
                latest = checkpoints.latest_checkpoint(self.folder) or "no checkpoint yet"
                if not is_lost:  # of that there is more to say
                    logger.info("%s: left after step %d of %d; %s", name, step, self.config.num_steps, latest)
        finally:
            self.stopping.wait_for_main()
        raise self.stopping.reason()

    def finish(self, step: int, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Write final/, the policy after the last step, and send it to the hub if asked."""
        policy = self._learners["policy"][1]

        def fill(folder: Path) -> None:
            save_model(policy, tokenizer, folder)
            for name, save in self._exports.items():
                save(folder / f"{name}_model")

        patience = self.config.early_stopping_patience
        state = {"stopped_early": self.stopped_early, "early_stopping_patience": patience, "best": self.best}

        def save() -> None:
            self._held.check()
            check_room(self.folder / checkpoints.FINAL_FOLDER, self._sizes().final)
            checkpoints.save_final(self.folder, step, fill=fill, **state)

        self._on_main(save)
        self.accelerator.wait_for_everyone()
        if self._repository is not None:  # which may take longer than processes wait for each other
            upload(self._repository, self.folder / checkpoints.FINAL_FOLDER)

    def _on_main(self, write: Callable[[], None]) -> None:
        """Have the main process write. All raise what it raises, so that none waits for one that has ended."""
        failed: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                reached(self.folder, write)
            except Exception as error:
                failed = error
        if self.accelerator.num_processes > 1:
            [sent] = broadcast_object_list([failed and _as_text(failed)])
            if failed is None and sent is not None:
                kind, text = sent
                raise kind(text)
        if failed is not None:
            raise failed

    def _sizes(self) -> Sizes:
        return sizes_of(self._learners, self._exports, use_lora=self.config.use_lora)

    def outcome(self, num_eval_prompts: int) -> list[str]:
        """Lines about a finished run: the held-out metric before and after, where its models are, how to go on."""
        return describe_outcome(self.folder, self.config, self.best, num_eval_prompts)

    def _writers(self, tokenizer: transformers.PreTrainedTokenizerBase) -> dict:
        writers = {METRICS_FILE: self._log.copy_metrics}
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


# What the other processes raise in place of an error of the main one, whose own class may not be sent to them.
_KINDS = (CannotWrite, WrongNumbers, ValueError, TypeError, OSError, MemoryError, RuntimeError)


def _as_text(error: Exception) -> tuple[type[Exception], str]:
    """What can be sent of an error: the nearest kind that takes a text, and its text."""
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    return kind, str(error) if type(error) is kind else f"{type(error).__name__}: {error}"


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
        if use_lora:
            save_adapter(module, folder)
        else:
            module.save_pretrained(folder)
            restore_outputs(module, folder)
    tokenizer.save_pretrained(folder)
