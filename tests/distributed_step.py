"""One gradient of the toy run for each of several cases; test_distributed.py starts it by torchrun.

Arguments: model folder, folder for runs and results, and the cases: how many of the 4 groups have no signal, a comma,
and 1 if what is left is filled up with other prompts, so that only groups with signal count, or 2 if these take the
places of the others, or 3 if none of them has a signal either. With another comma and "host", gradients are added up
and summed over processes there.
"""

import sys
from pathlib import Path

import torch

import common  # noqa: F401
from common.advantages import group_relative, rows_with_signal, whiten
from common.rollouts import Rollouts
from common.trainer import OnPolicyTrainer
from common.update.optimizers import HostAdamW
from tests.toy import toy_trainer


def main() -> None:
    """Take the step of every case."""
    model, folder, *cases = sys.argv[1:]
    for case in cases:
        num_dead, refills, *where = case.split(",")
        options = {"num_dead": int(num_dead), "refills": int(refills), "on_host": bool(where)}
        trainer = take_step(Path(model), Path(folder) / case, **options)
    # Threads of a process group that are still there when Python ends can abort the process.
    trainer.accelerator.state.destroy_process_group()


def take_step(model: Path, folder: Path, *, num_dead: int, refills: int, on_host: bool) -> OnPolicyTrainer:
    """Take one step of plain gradient descent with a learning rate of 1 and save the change of the weights."""
    settings = {"learning_rate": 1.0, "max_grad_norm": 0.0, "num_minibatches": 2, "kl_coef": 0.1}
    trainer = toy_trainer(model, folder / "run", **settings)
    trainer.policy.optimizer = torch.optim.SGD(trainer.policy.parameters, lr=1.0)
    if on_host:  # without memory and with an epsilon far above the gradient, a step is the gradient too
        trainer.policy.optimizer = HostAdamW([{"params": trainer.policy.parameters}], betas=(0.0, 0.0), eps=1.0)
    trainer.current_step = 1
    before = [p.detach().clone() for p in trainer.policy.parameters]
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    # The last groups of the step are the dead ones: with two of four they are all on the second process.
    rollouts.scores = torch.where(rollouts.rows >= 4 * (4 - num_dead), 0.5, trainer.score(rollouts))
    sampled = rollouts
    if refills == 3:
        trainer.score = lambda more: torch.full((len(more),), 0.5)
    if refills == 2:
        score = trainer.score
        # The first additional group teaches nothing: in the second round its place gets another one.
        trainer.score = lambda more: torch.where((more.rows < 4) & (len(more.step_lengths) > 4), 0.5, score(more))
    if refills >= 2:
        rollouts = trainer.refilled(sampled, rounds=2)
    advantages = group_relative(rollouts.scores, 4)
    rollouts.advantages = rollouts.spread(advantages)
    trainer.describe(rollouts, rollouts.advantages, sampled=sampled)
    whitened = whiten(rollouts.advantages, rollouts.completion_mask, sum_over_processes=trainer.sum_over_processes)
    moments = trainer.sum_over_processes(
        torch.stack([whitened.sum(), whitened.square().sum(), rollouts.completion_mask.sum().float()])
    )
    rollouts = rollouts.only(rows_with_signal(rollouts.scores, 4))
    if refills == 1:
        more = trainer.sample(trainer.training_prompts(1, refill=1), num_generations=4)
        more.scores = torch.where(more.rows < 4, 0.5, trainer.score(more))
        more.advantages = more.spread(group_relative(more.scores, 4))
        rollouts = Rollouts.joined([rollouts, more.only(rows_with_signal(more.scores, 4))]).renumbered()
    num_rows = torch.zeros(trainer.accelerator.num_processes)
    num_rows[trainer.accelerator.process_index] = len(rollouts)
    num_rows = trainer.sum_over_processes(num_rows)
    rollouts.old_logprobs = trainer.logprobs("policy", rollouts)
    rollouts.ref_logprobs = trainer.logprobs("ref", rollouts)
    trainer.update(trainer.policy, rollouts, trainer.loss, average_over="tokens")
    metrics = trainer.metrics.reduce(trainer.accelerator)
    if trainer.accelerator.is_main_process:
        step = torch.cat([(p.detach() - b).flatten() for p, b in zip(trainer.policy.parameters, before, strict=True)])
        content = {"step": step, "metrics": metrics, "moments": moments, "num_rows": num_rows}
        torch.save(content, folder / "result.pt")
    return trainer


if __name__ == "__main__":
    main()
