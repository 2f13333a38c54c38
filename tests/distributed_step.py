"""One gradient of the toy run, started by torchrun on any number of processes; test_distributed.py uses it.

Arguments: model folder, run folder, file for the result, how many of the 4 groups have no signal, and 1 if what is
left is filled up with other prompts, so that only groups with signal count.
"""

import sys
from pathlib import Path

import torch

import common  # noqa: F401
from common.advantages import group_relative, rows_with_signal, whiten
from common.rollouts import Rollouts
from tests.toy import toy_trainer


def main() -> None:
    """Take one step of plain gradient descent with a learning rate of 1 and save the change of the weights."""
    model, folder, result, num_dead, refills = sys.argv[1:6]
    settings = {"learning_rate": 1.0, "max_grad_norm": 0.0, "num_minibatches": 2, "kl_coef": 0.1}
    trainer = toy_trainer(Path(model), Path(folder), **settings)
    trainer.policy.optimizer = torch.optim.SGD(trainer.policy.parameters, lr=1.0)
    trainer.current_step = 1
    before = [p.detach().clone() for p in trainer.policy.parameters]
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    # The last groups of the step are the dead ones: with two of four they are all on the second process.
    rollouts.scores = torch.where(rollouts.rows >= 4 * (4 - int(num_dead)), 0.5, trainer.score(rollouts))
    advantages = group_relative(rollouts.scores, 4)
    rollouts.advantages = rollouts.spread(advantages)
    trainer.describe(rollouts, rollouts.advantages)
    whitened = whiten(rollouts.advantages, rollouts.completion_mask, sum_over_processes=trainer.sum_over_processes)
    moments = trainer.sum_over_processes(
        torch.stack([whitened.sum(), whitened.square().sum(), rollouts.completion_mask.sum().float()])
    )
    rollouts = rollouts.only(rows_with_signal(rollouts.scores, 4))
    if int(refills):
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
        torch.save(content, result)
    # Threads of a process group that are still there when Python ends can abort the process.
    trainer.accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main()
