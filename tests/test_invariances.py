"""What may not change a gradient: memory settings, rows without signal, padding, the way passes are split.

With plain gradient descent and a learning rate of 1 the change of the weights is the gradient itself.
"""

import pytest
import torch

from common.advantages import group_relative
from tests.toy import toy_trainer


def make_trainer(model, folder, **settings):
    trainer = toy_trainer(model, folder, learning_rate=1.0, max_grad_norm=0.0, **settings)
    trainer.policy.optimizer = torch.optim.SGD(trainer.policy.parameters, lr=1.0)
    trainer.current_step = 1
    return trainer


def sampled(trainer):
    """Scored rollouts with advantages, and old log-probs where the settings need them."""
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    rollouts.scores = trainer.score(rollouts)
    rollouts.advantages = rollouts.spread(group_relative(rollouts.scores, 4))
    return rollouts


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.parameters]


def step_taken(trainer, rollouts, *, average_over: str = "rows") -> torch.Tensor:
    """What one `update` adds to the weights, all in one vector; the weights are put back."""
    before = weights(trainer)
    if not trainer.config.trains_on_policy:
        rollouts.old_logprobs = trainer.logprobs("policy", rollouts)
    if trainer.config.kl_coef:
        rollouts.ref_logprobs = trainer.logprobs("ref", rollouts)
    trainer.update(trainer.policy, rollouts, trainer.loss, average_over=average_over)
    step = torch.cat([(a - b).flatten() for a, b in zip(weights(trainer), before, strict=True)])
    with torch.no_grad():
        for parameter, value in zip(trainer.policy.parameters, before, strict=True):
            parameter.copy_(value)
    assert step.abs().max() > 1e-4  # there is a gradient to compare
    return step


@pytest.mark.parametrize("average_over", ["tokens", "rows", "constant"])
def test_the_token_budget_changes_no_gradient(tiny_folder, tmp_path, average_over):
    steps = []
    for budget in (1, 37, 100_000):
        trainer = make_trainer(tiny_folder, tmp_path / str(budget), max_tokens_per_microbatch=budget)
        steps.append(step_taken(trainer, sampled(trainer), average_over=average_over))
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], atol=1e-6, rtol=1e-5)


def test_the_token_budget_changes_no_gradient_over_minibatches_and_epochs(tiny_folder, tmp_path):
    steps = []
    for budget in (1, 100_000):
        settings = {"num_minibatches": 2, "num_update_epochs": 2, "kl_coef": 0.1}
        trainer = make_trainer(tiny_folder, tmp_path / str(budget), max_tokens_per_microbatch=budget, **settings)
        steps.append(step_taken(trainer, sampled(trainer)))
    torch.testing.assert_close(*steps, atol=2e-5, rtol=1e-4)


def test_padding_changes_no_gradient_even_if_it_holds_garbage(tiny_folder, tmp_path):
    trainer = make_trainer(tiny_folder, tmp_path)
    rollouts = sampled(trainer)
    clean = step_taken(trainer, rollouts)
    clean_loss = trainer.metrics.reduce(trainer.accelerator)["policy/loss"]
    wide = trainer.sample(trainer.training_prompts(1), num_generations=4)
    for name in ("completion_ids", "completion_mask", "loss_mask", "sampling_logprobs", "advantages"):
        value = getattr(rollouts, name)
        garbage = torch.full((len(value), 5), float("nan")) if value.is_floating_point() else torch.full((16, 5), 9)
        setattr(wide, name, torch.cat([value, garbage.to(value.dtype)], dim=1))
    wide.completion_mask[:, -5:] = wide.loss_mask[:, -5:] = False
    wide.scores = rollouts.scores
    for name in ("advantages", "sampling_logprobs"):
        getattr(wide, name)[~wide.completion_mask] = float("nan")
    torch.testing.assert_close(step_taken(trainer, wide), clean, atol=1e-6, rtol=1e-5)
    assert trainer.metrics.reduce(trainer.accelerator)["policy/loss"] == pytest.approx(clean_loss, abs=1e-6)


def test_the_order_of_rows_changes_no_gradient(tiny_folder, tmp_path):
    trainer = make_trainer(tiny_folder, tmp_path)
    rollouts = sampled(trainer)
    shuffled = rollouts[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(step_taken(trainer, shuffled), step_taken(trainer, rollouts), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("average_over", ["tokens", "rows", "constant"])
@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_leaving_out_rows_without_advantage_changes_no_gradient(tiny_folder, tmp_path, average_over, num_minibatches):
    trainer = make_trainer(tiny_folder, tmp_path, num_minibatches=num_minibatches)
    rollouts = sampled(trainer)
    rollouts.advantages[4:12] = 0.0  # two groups of four have nothing to teach
    whole = step_taken(trainer, rollouts, average_over=average_over)
    kept = torch.cat([torch.arange(4), torch.arange(12, 16)])
    torch.testing.assert_close(
        step_taken(trainer, rollouts[kept], average_over=average_over), whole, atol=1e-6, rtol=1e-5
    )


def test_offload_changes_not_a_bit(tiny_folder, tmp_path):
    steps = []
    for offload in ("always", "never"):
        trainer = make_trainer(tiny_folder, tmp_path / offload, offload=offload, kl_coef=0.1)
        steps.append(step_taken(trainer, sampled(trainer)))
    assert torch.equal(*steps)


def test_gradient_clipping_sees_the_whole_minibatch(tiny_folder, tmp_path):
    norms = []
    for budget in (1, 100_000):
        trainer = make_trainer(tiny_folder, tmp_path / str(budget), max_tokens_per_microbatch=budget)
        step = step_taken(trainer, sampled(trainer))
        norms.append(trainer.metrics.reduce(trainer.accelerator)["policy/grad_norm"])
        assert norms[-1] == pytest.approx(float(step.norm()), rel=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_loss_and_metrics_do_not_depend_on_the_token_budget(tiny_folder, tmp_path):
    seen = []
    for budget in (1, 100_000):
        trainer = make_trainer(tiny_folder, tmp_path / str(budget), max_tokens_per_microbatch=budget, kl_coef=0.1)
        rollouts = sampled(trainer)
        rollouts.advantages += rollouts.spread(torch.ones(len(rollouts)))  # centred ones have a loss of 0
        step_taken(trainer, rollouts)
        seen.append(trainer.metrics.reduce(trainer.accelerator))
    assert seen[0].keys() == seen[1].keys() and seen[0]["policy/loss"] == pytest.approx(-1)
    for name, value in seen[0].items():
        assert value == pytest.approx(seen[1][name], abs=1e-5), name


def test_log_probs_are_taken_in_the_very_passes_of_the_first_epoch(toy_folder, tmp_path):
    """Other rows beside a row may change its last bits, and the ratio before the first step would not be 1."""
    settings = {"num_minibatches": 2, "num_update_epochs": 2, "max_tokens_per_microbatch": 60}
    trainer = make_trainer(toy_folder, tmp_path / "run", **settings)
    rollouts, taken, updated, loss = sampled(trainer), [], [], trainer.loss

    def forward(model, minibatch):
        taken.append(minibatch.completion_tokens)
        return torch.zeros(minibatch.completion_ids.shape)

    trainer.for_each_token("policy", rollouts, forward)
    trainer.loss = lambda model, minibatch: updated.append(minibatch.completion_tokens) or loss(model, minibatch)
    step_taken(trainer, rollouts)
    assert len(taken) > 2 and taken == updated[: len(taken)] and len(updated) > len(taken)
