"""Run: a run's folder, its log and its checkpoints, as the trainer sees them.

log.py, checkpoints.py and plots.py say what the files contain; this module decides when they are written.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypedDict

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.config import RLConfig
from common.mistakes import CannotWrite, TooLargeRow, WrongNumbers
from common.models.lora import save_adapter
from common.models.outputs import restore_outputs
from common.models.saving import save_model, save_parts
from common.rollouts import Rollouts
from common.runs import checkpoints, ended, parts
from common.runs.best import BEST_LINK, better_checkpoint, link_best, restore_best
from common.runs.disk import check_room, reached, remove_folder, written
from common.runs.folder import CONFIG_FILE, MAY_CHANGE, PROMPTS_FILE, has_begun, prepare_run_folder, stored_settings
from common.runs.held import HeldFolder, hold
from common.runs.hub import prepare_upload, upload
from common.runs.log import METRICS_FILE, RunLog, json_line, restore_metrics
from common.runs.manifest import digests_of, names_of_files
from common.runs.outcome import describe_outcome, length_matters
from common.runs.plots import draw_curves
from common.runs.progress import Progress
from common.runs.prompt_record import Record, check_processes_agree, check_record
from common.runs.room import Sizes, sizes_of, warn_of_little_room
from common.runs.stopping import Stopping
from common.sharding import is_part
from common.signals import name_of
from common.update.learner import Learner

logger = logging.getLogger("nanorlhf")

# Of a checkpoint with completions that wait for the next step.
WAITING_FILE = "waiting.pt"

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
        waiting: completions that wait for the next step, of all processes; every checkpoint keeps them. None: none do.

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
        kept = self.checkpoint and self.checkpoint / WAITING_FILE
        self.waiting: dict | None = checkpoints.load_tensors(kept) if kept and kept.is_file() else None
        # The token budget that was found to fit, and the one that it replaces: another one is tried out anew.
        self._budget: dict | None = state.get("token_budget")
        self._others: dict[str, str] | None = state.get("other_models")
        options = {"keeps_checkpoint": bool(config.save_every), "process_timeout": config.process_timeout}
        self.stopping = Stopping(config.stop_grace, accelerator, **options)
        self._learners: dict[str, tuple[Learner, nn.Module]] = {}
        self._uses: dict[str, Callable[[], AbstractContextManager]] = {}
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

    def restore(
        self,
        learner: Learner,
        module: nn.Module,
        save: Callable[[Path], None] | None = None,
        *,
        use: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """Save a learner in every checkpoint from now on, and load its state from the one to continue from.

        The policy's weights are loaded with the policy; the trained weights of every other module are loaded here.

        Args:
            learner: what is trained.
            module: its model.
            save: writes the model into the folder final/<name>_model; None: it is not part of final/.
            use: gives a context in which the model is on the device, where processes exchange tensors.
        """
        self._learners[learner.name] = (learner, module)
        self._uses[learner.name] = use
        if save is not None:
            self._exports[learner.name] = save
        self.stopping.together |= self._is_spread
        if self.checkpoint is None:
            return
        shapes = {name: parameter.shape for name, parameter in _trained(learner, module).items()}
        parts.check_same_model(self.checkpoint, learner.name, shapes, self.config.model)
        learner.load_optimizer(_optimizer_state(self.checkpoint, learner, module))
        if learner.name != checkpoints.POLICY_FOLDER:
            _load_weights(self.checkpoint, learner, module)

    def check_model(self, policy: nn.Module) -> None:
        """Refuse a checkpoint of another model before anything is loaded, as far as its parts tell.

        Args:
            policy: without storage and without adapter.

        Raises:
            ValueError: the model has other parameters, or the parts are those of another version.
        """
        if self.checkpoint is not None and not self.config.use_lora:
            shapes = {name: parameter.shape for name, parameter in policy.named_parameters()}
            parts.check_same_model(self.checkpoint, checkpoints.POLICY_FOLDER, shapes, self.config.model)

    def check_others(self, identities: dict[str, str]) -> None:
        """Keep what models are that no checkpoint holds; refuse to continue a run with others.

        Args:
            identities: by setting and value, what changes when the model's weights do.

        Raises:
            ValueError: names the model that has changed.
        """
        if self.checkpoint is not None and self._others is not None:
            for label, identity in identities.items():
                if self._others.get(label, identity) != identity:
                    raise ValueError(
                        f"output_dir={self.folder}: {label} is another model than at the run's start: its files have "
                        "changed. A resumed run continues exactly as the interrupted one would have. Bring the model "
                        "back, or pass another --output_dir for a new run."
                    )
        self._others = identities or None

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
                "score": float(rollouts.scores[row]) if parts else None,
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
        if self._others:
            kept["other_models"] = self._others
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
        if self._is_spread:
            self._save_together(tokenizer)
        else:
            self._on_main(lambda: self._save(tokenizer))

    def _save(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Write the checkpoint of the last step whose update is done, and delete older ones."""
        self._make_room()
        checkpoints.save_checkpoint(self.folder, self._saved_as, writers=self._writers(tokenizer), state=self._state)
        self._end_save()

    def _save_together(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """As _save, by all processes, each with its parts of what is spread over them."""
        split = {name: self._split(name) for name in self._learners}
        tensors = {name: tensor for _, of_one in split.values() for name, tensor in of_one.items()}
        policy = self._learners[checkpoints.POLICY_FOLDER][1]

        def begin() -> Path | None:
            self._make_room()
            return checkpoints.begin_checkpoint(self.folder, self._saved_as)

        def write_policy(folder: Path) -> None:
            with self._uses[checkpoints.POLICY_FOLDER]():
                save_parts(policy, tokenizer, folder / checkpoints.POLICY_FOLDER)

        fills = [lambda folder: parts.write_parts(folder / parts.PARTS_FOLDER, tensors), write_policy]

        def complete(folder: Path, digests: dict[str, str]) -> None:
            writers = self._writers(tokenizer) | {parts.PARTS_FOLDER: self._describe_parts}
            for name, (rest, _) in split.items():
                writers[f"{name}_optimizer.pt"] = lambda path, rest=rest: checkpoints.save_tensors(rest, path)
            state = {"writers": writers, "state": self._state, "digests": digests}
            checkpoints.complete_checkpoint(folder, self._saved_as, **state)

        self._write_together(begin, fills, complete)
        self._on_main(self._end_save)

    def _split(self, name: str) -> tuple[dict, dict[str, Tensor]]:
        """What a checkpoint holds of a learner beside the policy: what is small, and tensors that are spread."""
        learner, module = self._learners[name]
        trained = _trained(learner, module)
        in_order = {each: trained[each] for each in _in_order(learner, trained)}
        rest, tensors = parts.split_state(learner.optimizer.state_dict(), in_order, name)
        if name != checkpoints.POLICY_FOLDER:
            tensors |= {f"{name}.weights.{each}": parameter.detach() for each, parameter in trained.items()}
        return rest, tensors

    def _describe_parts(self, folder: Path) -> None:
        shapes = {
            name: {each: [*parameter.shape] for each, parameter in _trained(learner, module).items()}
            for name, (learner, module) in self._learners.items()
        }
        parts.write_description(folder, shapes, self.accelerator.num_processes)

    def _make_room(self) -> None:
        config, sizes, best = self.config, self._sizes(), (self.best or {}).get("checkpoint")
        room = {"needed": sizes.checkpoint, "largest": sizes.largest, "drop_oldest": config.save_drop_oldest_first}
        checkpoints.make_room(self.folder, self._saved_as, best=best, **room)

    def _end_save(self) -> None:
        written(self.folder / BEST_LINK, lambda: link_best(self.folder, self.best))
        checkpoints.rotate(self.folder, self.config.save_total_limit, (self.best or {}).get("checkpoint"))

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
            step, name = self._saved_as, name_of(self.stopping.number)
            is_new = self.config.save_every and step >= self.first_step  # older ones are there
            if is_new and self._is_spread and self.stopping.all_are_here():
                self._save_together(tokenizer)
            if self.accelerator.is_main_process:
                if is_new and not self._is_spread:
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

        def write_policy(folder: Path) -> None:
            with self._uses["policy"]() if self._is_spread else nullcontext():
                save_model(policy, tokenizer, folder)

        exports = [
            lambda folder, n=name, save=save: save(folder / f"{n}_model") for name, save in self._exports.items()
        ]
        fills = [write_policy, *exports]

        def fill(folder: Path) -> None:
            for write in fills:
                write(folder)

        patience = self.config.early_stopping_patience
        state = {"stopped_early": self.stopped_early, "early_stopping_patience": patience, "best": self.best}

        def check() -> None:
            self._held.check()
            check_room(self.folder / checkpoints.FINAL_FOLDER, self._sizes().final)

        def save() -> None:
            check()
            checkpoints.save_final(self.folder, step, fill=fill, **state)

        def begin() -> Path:
            check()
            return checkpoints.begin_final(self.folder)

        def complete(folder: Path, digests: dict[str, str]) -> None:
            checkpoints.complete_final(folder, step, digests=digests, **state)

        if self._is_spread:
            self._write_together(begin, fills, complete)
        else:
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

    @property
    def _is_spread(self) -> bool:
        """Whether models are spread over processes, which then write them together."""
        return any(is_part(learner.parameters[0]) for learner, _ in self._learners.values())

    def _write_together(
        self,
        begin: Callable[[], Path | None],
        fills: Sequence[Callable[[Path], None]],
        complete: Callable[[Path, dict[str, str]], None],
    ) -> None:
        """Have all processes write into one folder. All raise what one of them raises, and nothing is left then.

        Args:
            begin: called by the main process; gives the folder, or None if there is nothing to write.
            fills: each is called by all, with the folder, once the one before has gone well in all of them. Within
                one, what processes do together comes before what can fail in one of them.
            complete: called by the main process, with the folder and digests of what is in it by then.
        """
        begun: list[Path | None] = [None]
        self._on_main(lambda: begun.__setitem__(0, begin()))
        [folder] = broadcast_object_list(begun)
        if folder is None:
            return
        target = folder.with_name(folder.name.partition(".")[0])
        process, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        digests: dict[str, str] = {}

        def digest() -> None:  # a share of the files, since the hash of one is slower than most disks
            digests.update(digests_of(folder, names_of_files(folder)[process::num_processes]))

        try:
            for fill in fills:
                self._in_all(lambda fill=fill: written(target, lambda: fill(folder), tries_again=False))
            self._in_all(digest)
            known = {name: each for of_one in gather_object([digests]) for name, each in of_one.items()}
            self._on_main(lambda: written(target, lambda: complete(folder, known), tries_again=False))
        except BaseException:  # a full disk or Ctrl-C
            if self.accelerator.is_main_process:
                remove_folder(folder)
            raise

    def _in_all(self, write: Callable[[], None]) -> None:
        """Have all processes write. All raise what the first that failed raises, so that none waits for it."""
        failed: Exception | None = None
        try:
            reached(self.folder, write)
        except Exception as error:
            failed = error
        sent = next(filter(None, gather_object([failed and _as_text(failed)])), None)
        if failed is not None:
            raise failed
        if sent is not None:
            kind, text = sent
            raise kind(text)

    def _sizes(self) -> Sizes:
        num_writers = self.accelerator.num_processes if self._is_spread else 1
        return sizes_of(self._learners, self._exports, use_lora=self.config.use_lora, num_writers=num_writers)

    def outcome(self, num_eval_prompts: int) -> list[str]:
        """Lines about a finished run: the held-out metric before and after, where its models are, how to go on."""
        return describe_outcome(self.folder, self.config, self.best, num_eval_prompts)

    def _writers(self, tokenizer: transformers.PreTrainedTokenizerBase) -> dict:
        """What the main process writes into a checkpoint alone."""
        writers = {METRICS_FILE: self._log.copy_metrics}
        if self.waiting is not None:
            writers[WAITING_FILE] = lambda path: checkpoints.save_tensors(self.waiting, path)
        for name, (learner, module) in self._learners.items():
            if is_part(learner.parameters[0]):  # all processes write it
                continue
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
    return {name: parameter.detach().contiguous() for name, parameter in _trained(learner, module).items()}


def _trained(learner: Learner, module: nn.Module) -> dict[str, nn.Parameter]:
    """A learner's parameters by their names in its model."""
    trained = set(learner.parameters)
    return {name: parameter for name, parameter in module.named_parameters() if parameter in trained}


def _in_order(learner: Learner, trained: dict[str, nn.Parameter], *, in_one_group: bool = False) -> list[str]:
    """The names of a learner's parameters in the order of the numbers that its optimizer's state has for them.

    Args:
        learner: with its optimizer.
        trained: from `_trained`.
        in_one_group: of a state in which all parameters are in one group; see Learner.load_optimizer.
    """
    names = {parameter: name for name, parameter in trained.items()}
    groups = (group["params"] for group in learner.optimizer.param_groups)
    return [names[parameter] for parameter in (learner.parameters if in_one_group else chain.from_iterable(groups))]


def _optimizer_state(checkpoint: Path, learner: Learner, module: nn.Module) -> dict:
    """The state of a learner's optimizer in a checkpoint, spread as the learner's parameters are, or whole."""
    trained = _trained(learner, module)
    is_spread = is_part(learner.parameters[0])
    plain = not is_part(learner.holder(learner.parameters[0]))  # parts on the host
    state = checkpoints.load_tensors(checkpoint / f"{learner.name}_optimizer.pt", in_place=is_spread)
    if parts.names_in(state):
        return parts.read_state(state, checkpoint / parts.PARTS_FOLDER, trained, plain=plain)
    if not is_spread:
        return state
    in_order = _in_order(learner, trained, in_one_group=len(state["param_groups"]) == 1)
    return parts.spread_state(state, [trained[name] for name in in_order], plain=plain)


def _load_weights(checkpoint: Path, learner: Learner, module: nn.Module) -> None:
    """Load the trained weights of a model that is not the policy, whoever has written them."""
    trained, file = _trained(learner, module), checkpoint / f"{learner.name}.safetensors"
    if not file.exists():
        into = {f"{learner.name}.weights.{name}": parameter.detach() for name, parameter in trained.items()}
        parts.read_parts(checkpoint / parts.PARTS_FOLDER, into)
        return
    weights = load_file(file)
    if is_part(learner.parameters[0]):
        weights = {name: parts.spread_like(tensor, trained[name]) for name, tensor in weights.items()}
    _, unknown = module.load_state_dict(weights, strict=False)  # frozen weights are not in the file
    assert not unknown and len(weights) == len(learner.parameters)


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
