"""Out of memory in a pass: the run goes on at a smaller token budget, as one that began with it, bit for bit."""

import gc
import json
import logging
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from common.cli import run_script
from common.logprobs import token_logprobs
from common.mistakes import TooLargeRow
from common.runs.checkpoints import latest_checkpoint, load_state
from common.update.out_of_memory import is_out_of_memory, smaller_budget, too_large_row
from common.update.shared_prompts import tokens_of_pass
from tests.forked import launch
from tests.toy import (
    SEVERAL,
    algorithms,
    learners_of,
    metrics_of,
    samples_of,
    toy_config,
    toy_trainer,
    trained_weights,
    weights_of,
)

ROOT = Path(__file__).parent.parent

# Budgets of toy passes: a step has about 400 tokens in rows of 10 to 25.
BUDGET, HALF = 160, 80
ON_HOST = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."


class Memory:
    """Lets passes of a trainer's models fail, as an allocator does, where they have more than `limit` tokens.

    Args:
        trainer: of a toy run.
        limit: tokens of a pass, as its budget counts them.
        where: "forward" or "backward".
        error: what is raised.
    """

    def __init__(self, trainer, limit: int, where: str, error: Exception | None = None) -> None:
        self.limit, self.where, self.num_failed = limit, where, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        self.is_in_pass, self.num_rows, self.num_tokens = False, 0, 0
        run_passes = trainer.batches.run_passes

        def within_passes(minibatch, run):
            def counted(rows, microbatch):
                self.num_rows = len(microbatch)
                self.num_tokens = tokens_of_pass(microbatch, trainer.batches.packing)
                run(rows, microbatch)

            self.is_in_pass = True
            try:
                return run_passes(minibatch, counted)
            finally:
                self.is_in_pass = False

        trainer.batches.run_passes = within_passes
        for name in ("policy", "ref", "value"):
            if name in trainer.models._models:
                for module in trainer.models._models[name].module.modules():
                    if isinstance(module, nn.Embedding):
                        module.register_forward_hook(self._after)

    def _after(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if not self.is_in_pass:
            return output
        if self.where == "forward":
            self._check()
        elif output.requires_grad:
            output.register_hook(lambda _: self._check())
        return output

    def _check(self) -> None:
        if self.num_rows > 1 and self.num_tokens > self.limit:
            self.num_failed += 1
            raise self.error


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


RUNS = {
    "on-policy": {"algorithm": "GRPO"},
    "KL in the loss": {"algorithm": "GRPO", "kl_coef": 0.1, "kl_place": "loss"},
    "several steps": {"algorithm": "GRPO", "kl_coef": 0.1, "kl_place": "reward", **SEVERAL},
    "values": {"algorithm": "PPO", "kl_coef": 0.1, **SEVERAL},
}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_short_of_memory_is_one_that_began_with_its_budget(toy_folder, tmp_path, caplog, name, where):
    """Also where log-probs and values of the step were there before: they are of the new passes too."""
    settings = RUNS[name] | {"num_steps": 2}
    if settings["algorithm"] == "PPO":
        settings["value_init"] = "none"
    short = toy_trainer(toy_folder, tmp_path / "short", max_tokens_per_microbatch=BUDGET, **settings)
    memory = Memory(short, HALF, where)
    found = trained_weights(short)
    assert memory.num_failed == 1 and short.batches.max_tokens_per_microbatch == HALF
    [said] = [record.message for record in caplog.records if "out of memory" in record.message]
    assert f"max_tokens_per_microbatch is {HALF} from now on, no longer {BUDGET}" in said
    assert "first optimizer step is" not in caplog.text
    began = toy_trainer(toy_folder, tmp_path / "began", max_tokens_per_microbatch=HALF, **settings)
    assert torch.equal(found, trained_weights(began))
    assert metrics_of(tmp_path / "short") == metrics_of(tmp_path / "began")
    assert samples_of(tmp_path / "short") == samples_of(tmp_path / "began")
    assert [line["memory/max_tokens_per_microbatch"] for line in lines_of(tmp_path / "short")] == [HALF] * 2


def test_the_hosts_allocator_is_answered_in_the_same_way(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "short", max_tokens_per_microbatch=BUDGET, num_steps=1)
    Memory(trainer, HALF, "backward", error=RuntimeError(ON_HOST))
    found = trained_weights(trainer)
    began = toy_trainer(toy_folder, tmp_path / "began", max_tokens_per_microbatch=HALF, num_steps=1)
    assert torch.equal(found, trained_weights(began))


def test_what_means_that_memory_is_short():
    with pytest.raises(RuntimeError) as missing:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(missing.value) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError(ON_HOST))


def test_another_error_of_a_pass_stays_as_it_is(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", max_tokens_per_microbatch=BUDGET)
    Memory(trainer, HALF, "backward", error=RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()


@pytest.mark.parametrize(
    ("budget", "failed", "smaller"), [(100, 90, 50), (100, 50, 25), (16384, 3000, 2048), (3, 3, 1), (1, 40, 0)]
)
def test_the_budget_is_halved_until_the_pass_that_failed_is_split(budget, failed, smaller):
    assert smaller_budget(budget, failed) == smaller


def test_the_budget_falls_further_where_half_is_too_much(toy_folder, tmp_path):
    """A mini-batch that was far below its budget is not done in the same passes again."""
    trainer = toy_trainer(toy_folder, tmp_path / "run", max_tokens_per_microbatch=160 * 64, num_steps=1)
    memory = Memory(trainer, 40, "forward")
    trainer.train()
    assert trainer.batches.max_tokens_per_microbatch == 40 and memory.num_failed <= 4


def test_after_the_first_optimizer_step_of_a_step_its_other_mini_batches_have_the_smaller_budget(
    toy_folder, tmp_path, caplog
):
    """Weights that have changed stay: then the run is one whose budget was lowered at that moment."""
    weights = []
    for folder in ("short", "lowered"):
        settings = {"max_tokens_per_microbatch": BUDGET, "num_minibatches": 2, "num_steps": 1}
        trainer = toy_trainer(toy_folder, tmp_path / folder, **settings)
        memory = Memory(trainer, 10**9, "backward")
        whole = trainer.policy.optimizer_step

        def after_one(*args, trainer=trainer, memory=memory, folder=folder, whole=whole, **options):
            norm = whole(*args, **options)
            memory.limit = HALF if folder == "short" else 10**9
            if folder == "lowered":
                trainer.batches.max_tokens_per_microbatch = HALF
            return norm

        trainer.policy.optimizer_step = after_one
        weights.append(trained_weights(trainer))
        assert memory.num_failed == (folder == "short")
    assert torch.equal(*weights)
    assert metrics_of(tmp_path / "short") == metrics_of(tmp_path / "lowered")


def test_a_maximum_over_a_mini_batch_leaves_out_passes_that_are_done_again(toy_folder, tmp_path):
    settings = {"max_tokens_per_microbatch": BUDGET, "num_minibatches": 2, "num_steps": 1}
    trainer = toy_trainer(toy_folder, tmp_path / "run", **settings)
    memory, loss, whole = Memory(trainer, 10**9, "backward"), trainer.loss, trainer.policy.optimizer_step

    def after_one(*args, **options):
        memory.limit = HALF
        return whole(*args, **options)

    def with_maximum(model, microbatch):
        per_token, metrics = loss(model, microbatch)
        is_lost = memory.limit == HALF and memory.num_failed == 0
        return per_token, metrics | {"max/largest": torch.full_like(per_token.detach(), 9.0 if is_lost else 1.0)}

    trainer.policy.optimizer_step, trainer.loss = after_one, with_maximum
    assert trainer.train()["largest"] == 1.0 and memory.num_failed == 1


def test_a_value_model_that_is_short_of_memory_after_the_policys_steps_does_not_repeat_them(toy_folder, tmp_path):
    settings = {"algorithm": "PPO", "value_init": "none", "max_tokens_per_microbatch": BUDGET, "num_steps": 1}
    trainer = toy_trainer(toy_folder, tmp_path / "run", **settings)
    memory = Memory(trainer, 10**9, "backward")
    update, updated = trainer.update, []

    def noted(learner, *args, **options):
        memory.limit = HALF if learner is trainer.value else 10**9
        updated.append(learner.name)
        update(learner, *args, **options)

    trainer.update = noted
    trainer.train()
    assert memory.num_failed == 1 and updated == ["policy", "value"]


class Marker:
    """Lives as long as what holds it."""


class Marked(torch.autograd.Function):
    """Puts a marker into a graph."""

    @staticmethod
    def forward(ctx, values, marker):
        ctx.marker = marker
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_the_graph_of_a_pass_that_failed_is_gone_before_the_next_one(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", max_tokens_per_microbatch=BUDGET, num_steps=1)
    memory, held = Memory(trainer, HALF, "backward"), []
    loss = trainer.loss

    def watched(model, microbatch):
        if memory.num_failed:
            assert held[-1]() is None
        per_token, metrics = loss(model, microbatch)
        marker = Marker()
        held.append(weakref.ref(marker))
        return Marked.apply(per_token, marker), metrics

    trainer.loss = watched
    gc.disable()  # what the collector would free late is held for too long
    try:
        trainer.train()
    finally:
        gc.enable()
    assert memory.num_failed == 1


def test_a_resumed_run_keeps_the_budget_unless_the_setting_changes(toy_folder, tmp_path):
    settings = {"max_tokens_per_microbatch": BUDGET, "save_every": 1}
    trainer = toy_trainer(toy_folder, tmp_path / "run", num_steps=1, **settings)
    Memory(trainer, HALF, "forward")
    trainer.train()
    state = load_state(latest_checkpoint(tmp_path / "run"))
    assert state["token_budget"] == {"at_start": BUDGET, "fits": HALF}
    again = toy_trainer(toy_folder, tmp_path / "run", num_steps=2, resume="extend", **settings)
    assert again.batches.max_tokens_per_microbatch == HALF
    again.train()
    assert load_state(latest_checkpoint(tmp_path / "run"))["token_budget"]["fits"] == HALF
    other = settings | {"max_tokens_per_microbatch": 2 * BUDGET}
    assert toy_trainer(toy_folder, tmp_path / "run", num_steps=3, resume="extend", **other).batches.has_less is False


def test_a_run_with_enough_memory_says_nothing_of_a_budget(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", num_steps=1, save_every=1)
    trainer.train()
    assert "token_budget" not in load_state(latest_checkpoint(tmp_path / "run"))


@pytest.mark.parametrize("where", ["update", "log-probs"])
def test_a_row_that_does_not_fit_alone_ends_the_run_with_its_length(toy_folder, tmp_path, capsys, where):
    trainer = toy_trainer(toy_folder, tmp_path / "run", max_tokens_per_microbatch=BUDGET)
    trainer.current_step = 1
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    longest = int(rollouts.total_lengths.max())

    def fail(model, microbatch):
        if int(microbatch.total_lengths.max()) == longest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return token_logprobs(model, microbatch, 1.0)[0]

    def work():
        if where == "update":
            rollouts.advantages = rollouts.spread(rollouts.lengths.float())
            trainer.update(trainer.policy, rollouts, lambda *args: (fail(*args), {}), average_over="tokens")
        trainer.for_each_token("policy", rollouts, fail)

    before = weights_of(trainer)
    with pytest.raises(SystemExit) as ended:
        run_script(work)
    assert ended.value.code == 2 and torch.equal(before, weights_of(trainer))
    said = capsys.readouterr().err
    assert said.startswith(f"error: out of memory: a row of {longest} tokens, prompt and completion, does not fit")
    assert "--gradient_checkpointing true" in said and said.count("\n") <= 8


def test_what_a_run_has_already_is_not_proposed():
    needed = str(too_large_row(7, toy_config(Path("m"), Path("o"), gradient_checkpointing=True, use_lora=True)))
    assert "gradient_checkpointing" not in needed and "use_lora" not in needed
    assert isinstance(too_large_row(7, toy_config(Path("m"), Path("o"))), TooLargeRow)


@pytest.mark.parametrize("name", sorted(algorithms()))
@pytest.mark.slow
def test_every_algorithm_begins_its_step_anew(toy_folder, tmp_path, name):
    settings = {"algorithm": name, "num_steps": 1}
    short = toy_trainer(toy_folder, tmp_path / "short", max_tokens_per_microbatch=BUDGET, **settings)
    memory = Memory(short, 40, "backward")  # RAFT trains on few rows
    found = trained_weights(short)
    assert memory.num_failed >= 1
    budget = short.batches.max_tokens_per_microbatch
    began = toy_trainer(toy_folder, tmp_path / "began", max_tokens_per_microbatch=budget, **settings)
    assert torch.equal(found, trained_weights(began)) and len(learners_of(short)) >= 1
    assert metrics_of(tmp_path / "short") == metrics_of(tmp_path / "began")
    assert logging.getLogger("nanorlhf").level <= logging.WARNING


ON_ONE = """
import sys
from pathlib import Path
import common
import torch
from tests.test_out_of_memory import BUDGET, HALF, Memory
from tests.toy import toy_trainer, trained_weights

model, folder = Path(sys.argv[1]), Path(sys.argv[2])
settings = {"num_update_epochs": 2, "kl_coef": 0.1, "num_steps": 2}
began = toy_trainer(model, folder / "began", max_tokens_per_microbatch=HALF, **settings)
weights = trained_weights(began)
for where in ("forward", "backward"):
    short = toy_trainer(model, folder / where, max_tokens_per_microbatch=BUDGET, **settings)
    memory = Memory(short, HALF if short.accelerator.process_index == 1 else 10**9, where)
    assert torch.equal(trained_weights(short), weights)
    assert memory.num_failed == short.accelerator.process_index, memory.num_failed
    assert short.batches.max_tokens_per_microbatch == HALF

alone = toy_trainer(model, folder / "alone", num_steps=1)
loss = alone.loss
def fail(*args):
    if alone.accelerator.process_index == 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return loss(*args)
alone.loss, alone.batches.max_tokens_per_microbatch = fail, 1
try:
    alone.train()
except ValueError as error:
    assert "does not fit although it is alone" in str(error)
    (folder / f"told-{alone.accelerator.process_index}").touch()
alone.accelerator.state.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_agree_when_memory_of_one_is_short(toy_folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ON_ONE)
    launch(2, [script, toy_folder, tmp_path])
    assert (tmp_path / "told-0").exists() and (tmp_path / "told-1").exists()
    assert metrics_of(tmp_path / "forward") == metrics_of(tmp_path / "backward") == metrics_of(tmp_path / "began")
