"""Losses by hand and by enumeration: which tokens the clip stops, what a KL term really pulls at, what the mean is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from common.losses import (
    chosen_correction,
    clipped_policy_loss,
    clipped_surrogate,
    clipped_tokens,
    importance_ratio,
    importance_weights,
    kl_estimate,
    policy_metrics,
    sampling_kl,
    sequence_ratio,
    token_weights,
)
from common.rollouts import Rollouts
from PPO.value_model import clipped_value_loss

ESTIMATORS = ["k1", "k2", "k3"]


def slope(loss, *arguments):
    """d loss / d first argument, of the sum of the loss."""
    first = arguments[0].clone().requires_grad_()
    loss(first, *arguments[1:]).sum().backward()
    return first.grad


# The ratio


def test_the_ratio_of_the_policy_that_sampled_is_exactly_one_with_the_gradient_of_the_logprob():
    logprobs = torch.tensor([[-0.1, -7.3, -25.0]], requires_grad=True)
    for old_logprobs in (None, logprobs.detach().clone()):
        ratio = importance_ratio(logprobs, old_logprobs)
        assert ratio.tolist() == [[1.0, 1.0, 1.0]]
        (gradient,) = torch.autograd.grad(ratio.sum(), logprobs)
        assert gradient.tolist() == [[1.0, 1.0, 1.0]]


def test_the_ratio_is_now_over_then():
    probability = torch.tensor([0.6, 0.1, 0.25]).log()
    before = torch.tensor([0.3, 0.2, 0.25]).log()
    assert importance_ratio(probability, before).tolist() == pytest.approx([2.0, 0.5, 1.0])


def test_on_policy_the_gradient_is_minus_the_advantage_at_every_token():
    """REINFORCE's, at the first and the last token too."""
    advantages = torch.tensor([[1.5, -2.0, 0.0, 0.25]])
    gradient = slope(
        lambda logp: clipped_surrogate(importance_ratio(logp, None), advantages, 0.2, 0.2), -torch.ones(1, 4)
    )
    assert gradient.tolist() == [[-1.5, 2.0, 0.0, -0.25]]


@pytest.mark.parametrize("far", [-1000.0, -89.0, -20.0, 20.0, 89.0, 1000.0])
def test_the_ratio_and_its_gradient_stay_finite_however_far_the_policy_has_moved(far):
    old_logprobs = torch.tensor([-1.0])
    assert importance_ratio(old_logprobs + far, old_logprobs).isfinite().all()
    assert slope(importance_ratio, old_logprobs + far, old_logprobs).isfinite().all()


def test_the_ratio_of_a_completion_is_the_product_of_those_of_its_real_tokens():
    """2 x 0.5 x 3 = 3 and 0.25; padding adds nothing to it."""
    ratios = torch.tensor([[2.0, 0.5, 3.0], [0.25, 7.0, 7.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    old_logprobs = torch.full((3, 3), -1.5)
    logprobs = torch.where(mask, old_logprobs + ratios.log(), math.nan)
    ratio = sequence_ratio(logprobs, old_logprobs, mask)
    torch.testing.assert_close(ratio, torch.tensor([[3.0], [0.25], [1.0]]))


def test_on_policy_the_ratio_of_a_completion_is_one_and_every_token_of_it_pulls_at_every_other():
    logprobs = torch.tensor([[-0.1, -7.3, -25.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    for old_logprobs in (None, logprobs.detach().clone()):
        ratio = sequence_ratio(logprobs, old_logprobs, mask)
        assert ratio.tolist() == [[1.0]]
        (gradient,) = torch.autograd.grad(ratio[0, 0], logprobs)
        assert gradient.tolist() == [[1.0, 1.0, 0.0]]


def test_a_long_completion_that_has_moved_far_keeps_a_finite_ratio():
    old_logprobs, mask = torch.zeros(1, 1000), torch.ones(1, 1000, dtype=torch.bool)
    for far in (-1.0, 1.0):
        assert sequence_ratio(old_logprobs + far, old_logprobs, mask).isfinite().all()


# The clip


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "passes"),
    [
        (2.0, 1.0, -2.0, True),
        (2.0, 1.1, -2.2, True),
        (2.0, 1.5, -2.6, False),  # the good token is likelier already: 2 x 1.3
        (2.0, 0.5, -1.0, True),  # it has become less likely: pull it back
        (-2.0, 1.0, 2.0, True),
        (-2.0, 0.9, 1.8, True),
        (-2.0, 0.5, 1.6, False),  # the bad token is less likely already: 2 x 0.8
        (-2.0, 1.5, 3.0, True),  # it has become likelier: push it down
        (0.0, 1.5, 0.0, False),
        (0.0, 0.5, 0.0, False),
    ],
)
def test_the_clip_stops_a_gradient_only_on_the_side_the_advantage_pushes_to(advantage, ratio, loss, passes):
    arguments = torch.tensor([ratio]), torch.tensor([advantage]), 0.2, 0.3
    assert clipped_surrogate(*arguments).item() == pytest.approx(loss)
    assert slope(clipped_surrogate, *arguments).item() == pytest.approx(-advantage if passes else 0.0)
    assert clipped_tokens(*arguments).item() == float(not passes and advantage != 0)


def test_the_upper_side_can_be_wider_than_the_lower():
    """DAPO's clip-higher: 1.25 passes below 1.28 and not below 1.2; the lower side stays where it was."""
    good, bad = torch.tensor([1.0]), torch.tensor([-1.0])
    assert slope(clipped_surrogate, torch.tensor([1.25]), good, 0.2, 0.28).item() == -1.0
    assert slope(clipped_surrogate, torch.tensor([1.25]), good, 0.2, 0.2).item() == 0.0
    assert slope(clipped_surrogate, torch.tensor([0.75]), bad, 0.2, 0.28).item() == 0.0
    assert slope(clipped_surrogate, torch.tensor([0.75]), bad, 0.28, 0.2).item() == 1.0


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 5), st.floats(-3, 3), st.floats(0.05, 0.6), st.floats(0.05, 2))
def test_the_clip_is_never_better_than_no_clip_and_counts_where_the_gradient_is_gone(ratio, advantage, low, high):
    arguments = torch.tensor([ratio]), torch.tensor([advantage]), low, high
    assert clipped_surrogate(*arguments).item() >= -advantage * ratio - 1e-5
    gone = slope(clipped_surrogate, *arguments).item() == 0 and abs(advantage) > 1e-6
    if min(abs(ratio - 1 + low), abs(ratio - 1 - high)) > 1e-4 and abs(advantage) > 1e-6:
        assert bool(clipped_tokens(*arguments).item()) == gone


def test_the_surrogates_gradient_is_the_slope_of_its_value():
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5], dtype=torch.float64)
    logprobs = (old + torch.tensor([0.05, 0.9, -0.7, 0.4, -0.1], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda logp: clipped_surrogate(importance_ratio(logp, old), advantages, 0.2, 0.3), logprobs
    )


def test_several_steps_on_the_same_rollouts_end_at_the_clip():
    """The old log-probs stay; after a few steps the tokens have moved to the border and no further."""
    logits = torch.zeros(4, requires_grad=True)
    old_logprobs = logits.detach().log_softmax(0)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])
    fractions = []
    for _ in range(40):
        ratio = importance_ratio(logits.log_softmax(0), old_logprobs)
        fractions.append(clipped_tokens(ratio, advantages, 0.2, 0.2).sum().item())
        (gradient,) = torch.autograd.grad(clipped_surrogate(ratio, advantages, 0.2, 0.2).sum(), logits)
        logits = (logits - 0.05 * gradient).detach().requires_grad_()
    assert fractions[0] == 0 and fractions[-1] == 2
    assert 1.2 < ratio[0] < 1.3 and 0.7 < ratio[1] < 0.8 and not gradient.any()


@pytest.mark.parametrize(("level", "clipped"), [("token", [[1.0, 0.0, 0.0]]), ("sequence", [[0.0]])])
def test_the_clip_sees_the_ratio_of_a_token_or_of_the_whole_completion(rollouts, level, clipped):
    """Ratios 2, 0.5 and 1 of tokens that were good: the first is clipped alone, the whole is 1 and is not."""
    minibatch = rollouts[torch.tensor([3])].trimmed()  # a row of three tokens
    minibatch.advantages = torch.ones(1, 3)
    minibatch.old_logprobs = torch.tensor([[-1.0, -1.0, -1.0]])
    logprobs = minibatch.old_logprobs + torch.tensor([[2.0, 0.5, 1.0]]).log()
    if level == "token":
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)
    else:
        ratio = sequence_ratio(logprobs, minibatch.old_logprobs, minibatch.loss_mask)
    loss, metrics = clipped_policy_loss(ratio, logprobs, torch.zeros(1, 3), minibatch, (0.2, 0.3))
    assert metrics["policy/clip_fraction"].tolist() == clipped
    expected = [[-1.3, -0.5, -1.0]] if level == "token" else [[-1.0, -1.0, -1.0]]
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_the_ratio_and_the_clip_of_whole_completions_are_one_number_each(rollouts):
    """Ratios 2 and 1 of completions of one token and of four, which were good: the first is clipped."""
    minibatch = rollouts[torch.tensor([1, 0])].trimmed()
    minibatch.advantages = minibatch.spread(torch.ones(2))
    minibatch.old_logprobs = minibatch.sampling_logprobs
    logprobs = minibatch.old_logprobs + torch.tensor([[2.0, 1.0, 1.0, 1.0], [1.0] * 4]).log()
    ratio = sequence_ratio(logprobs, minibatch.old_logprobs, minibatch.loss_mask)
    loss, metrics = clipped_policy_loss(ratio, logprobs, torch.zeros(2, 4), minibatch, (0.2, 0.2))
    assert loss.shape == (2, 4)
    torch.testing.assert_close(metrics["policy/ratio"], torch.tensor([[2.0], [1.0]]))
    assert metrics["policy/clip_fraction"].tolist() == [[1.0], [0.0]]
    assert metrics["entropy"].shape == (2, 4)


def test_the_kl_that_is_reported_is_that_of_the_policy_that_sampled_over_all_its_tokens(rollouts):
    minibatch = rollouts[torch.tensor([1])].trimmed()  # a row of one token
    minibatch.loss_mask = torch.zeros(1, 1, dtype=torch.bool)  # not trained on
    minibatch.old_logprobs, minibatch.ref_logprobs = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    for old_logprobs, expected in ((torch.tensor([[-1.0]]), 0.5), (None, -0.5)):
        minibatch.old_logprobs = old_logprobs
        kl, mask = sampling_kl(torch.tensor([[-2.0]], requires_grad=True), minibatch)
        assert kl.item() == expected and not kl.requires_grad and mask.item()


# The values


def test_the_clip_of_the_value_counts_no_rounding():
    values, old_values, returns = torch.randn(3, 1, 10_000) * 0.3
    error, _ = clipped_value_loss(values, old_values, returns, clip_range=None)
    loss, clipped = clipped_value_loss(values, old_values, returns, clip_range=1e6)
    assert not clipped.any() and torch.equal(loss, error)
    _, clipped = clipped_value_loss(values, old_values, returns, clip_range=0.2)
    assert (values - old_values).abs()[clipped.bool()].min() > 0.2


@pytest.mark.parametrize(
    ("value", "loss", "pull"),
    [
        (1.0, 4.0, -4.0),  # it has not moved: (1 - 3)^2
        (1.1, 3.61, -3.8),
        (1.5, 3.24, 0.0),  # it has come closer by more than 0.2: held at (1.2 - 3)^2
        (0.9, 4.41, -4.2),
        (0.5, 6.25, -5.0),  # it has gone away from the target: pulled back, clip or not
        (3.0, 3.24, 0.0),  # arrived, but too fast
        (5.5, 6.25, 5.0),  # past it, and further off than the clipped one
    ],
)
def test_the_clip_of_the_value_stops_what_gets_better_too_fast(value, loss, pull):
    """Old value 1, target 3, clip 0.2."""
    values = torch.tensor([[value]], requires_grad=True)
    per_token, clipped = clipped_value_loss(values, torch.tensor([[1.0]]), torch.tensor([[3.0]]), clip_range=0.2)
    (gradient,) = torch.autograd.grad(per_token.sum(), values)
    assert per_token.item() == pytest.approx(loss) and gradient.item() == pytest.approx(pull, abs=1e-6)
    assert clipped.item() == float(pull == 0)


def test_without_a_clip_the_value_loss_is_the_squared_error_wherever_the_value_was():
    values, returns = torch.tensor([[1.0, -2.0, 9.0]]), torch.tensor([[3.0, -2.0, 4.0]])
    for old_values in (torch.zeros(1, 3), values):
        loss, clipped = clipped_value_loss(values, old_values, returns, clip_range=None)
        assert loss.tolist() == [[4.0, 0.0, 25.0]] and clipped.tolist() == [[0.0] * 3]


@settings(max_examples=60)
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5), st.floats(0.01, 3))
def test_the_clipped_value_loss_is_never_below_the_squared_error(value, old_value, target, clip_range):
    numbers = [torch.tensor([[x]], dtype=torch.float64) for x in (value, old_value, target)]
    assert clipped_value_loss(*numbers, clip_range=clip_range)[0].item() >= (value - target) ** 2 - 1e-12


# The KL


def policy_and_reference() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy and a reference over four tokens, clearly apart."""
    return torch.tensor([0.5, -0.3, 1.2, 0.1], dtype=torch.float64), torch.tensor([0.0, 0.8, 0.2, -0.5]).double()


def gradient_of(function, logits):
    logits = logits.clone().requires_grad_()
    function(logits).backward()
    return logits.grad


def true_gradients() -> tuple[torch.Tensor, torch.Tensor]:
    """Of KL(policy || reference) and of KL(reference || policy), with respect to the policy's logits."""
    policy, ref = policy_and_reference()
    reference = Categorical(logits=ref)
    return (
        gradient_of(lambda logits: kl_divergence(Categorical(logits=logits), reference), policy),
        gradient_of(lambda logits: kl_divergence(reference, Categorical(logits=logits)), policy),
    )


def expected_gradient_in_loss(estimator: str) -> torch.Tensor:
    """Mean over all four tokens, by their probability, of the gradient of the estimate at that token."""
    policy, ref = policy_and_reference()

    def mean(logits):
        logprobs = logits.log_softmax(0)
        return (logprobs.detach().exp() * kl_estimate(logprobs, ref.log_softmax(0), estimator)).sum()

    return gradient_of(mean, policy)


def expected_gradient_in_reward(estimator: str) -> torch.Tensor:
    """Mean over all four tokens of estimate x gradient of the log-prob: what subtracting it from the score does."""
    policy, ref = policy_and_reference()

    def mean(logits):
        logprobs = logits.log_softmax(0)
        kl = kl_estimate(logprobs, ref.log_softmax(0), estimator).detach()
        return (logprobs.detach().exp() * kl * logprobs).sum()

    return gradient_of(mean, policy)


def test_k1_and_k3_are_the_kl_on_average():
    policy, ref = policy_and_reference()
    truth = kl_divergence(Categorical(logits=policy), Categorical(logits=ref)).item()
    for estimator in ("k1", "k3"):
        estimate = kl_estimate(policy.log_softmax(0), ref.log_softmax(0), estimator)
        assert (policy.softmax(0) * estimate).sum().item() == pytest.approx(truth, rel=1e-9)


def test_k2_is_nearly_the_kl_where_the_policies_are_near():
    policy, ref = policy_and_reference()
    near = policy + 0.1 * (ref - policy)
    truth = kl_divergence(Categorical(logits=policy), Categorical(logits=near)).item()
    estimate = (policy.softmax(0) * kl_estimate(policy.log_softmax(0), near.log_softmax(0), "k2")).sum().item()
    assert estimate == pytest.approx(truth, rel=0.05) and estimate != pytest.approx(truth, rel=1e-4)


def test_estimates_by_hand():
    """A token of probability 0.5 that the reference gives 0.25: k1 is ln 2, k2 half its square, k3 ln 2 - 0.5."""
    logprobs, ref = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    assert kl_estimate(logprobs, ref, "k1").tolist() == pytest.approx([0.693147, -0.693147], abs=1e-6)
    assert kl_estimate(logprobs, ref, "k2").tolist() == pytest.approx([0.240227, 0.240227], abs=1e-6)
    assert kl_estimate(logprobs, ref, "k3").tolist() == pytest.approx([0.193147, 0.306853], abs=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_policy_that_is_its_reference_has_a_kl_of_exactly_zero_and_feels_no_pull(estimator):
    logprobs = torch.tensor([-0.3, -4.0, -11.0])
    assert kl_estimate(logprobs, logprobs.clone(), estimator).tolist() == [0.0] * 3
    if estimator != "k1":
        assert slope(kl_estimate, logprobs, logprobs.clone(), estimator).tolist() == [0.0] * 3


def test_k1_in_the_loss_pulls_nowhere_on_average():
    torch.testing.assert_close(expected_gradient_in_loss("k1"), torch.zeros(4).double(), atol=1e-12, rtol=0)


def test_k2_in_the_loss_pulls_like_the_kl_of_the_policy_to_the_reference():
    to_reference, _ = true_gradients()
    torch.testing.assert_close(expected_gradient_in_loss("k2"), to_reference, atol=1e-12, rtol=1e-9)


def test_k3_in_the_loss_pulls_like_the_kl_of_the_reference_to_the_policy():
    to_reference, from_reference = true_gradients()
    torch.testing.assert_close(expected_gradient_in_loss("k3"), from_reference, atol=1e-12, rtol=1e-9)
    assert (to_reference - from_reference).norm() > 0.1 * to_reference.norm()  # the two are told apart


def test_k1_in_the_reward_pulls_like_the_kl_of_the_policy_to_the_reference():
    to_reference, _ = true_gradients()
    torch.testing.assert_close(expected_gradient_in_reward("k1"), to_reference, atol=1e-12, rtol=1e-9)


def test_k3_in_the_reward_pulls_like_the_difference_of_the_two_kls():
    """Near the reference the two KLs are the same to second order: in the reward k3 does next to nothing."""
    to_reference, from_reference = true_gradients()
    torch.testing.assert_close(expected_gradient_in_reward("k3"), to_reference - from_reference, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("far", [-1000.0, -20.0, 20.0, 1000.0])
def test_estimates_and_their_gradients_stay_finite_however_far_the_reference_is(estimator, far):
    logprobs = torch.tensor([-1.0])
    estimate = kl_estimate(logprobs, logprobs + far, estimator)
    assert estimate.dtype == torch.float32 and estimate.isfinite().all()
    assert slope(kl_estimate, logprobs, logprobs + far, estimator).isfinite().all()
    if estimator != "k1":
        assert estimate.item() > 0


def test_k1_is_not_cut_where_nothing_can_overflow():
    assert kl_estimate(torch.tensor([-1.0]), torch.tensor([-31.0]), "k1").item() == 30.0


@settings(max_examples=60, deadline=None)
@given(st.floats(-15, 0), st.floats(-15, 0))
def test_k2_and_k3_are_never_negative(logprob, ref_logprob):
    for estimator in ("k2", "k3"):
        assert kl_estimate(torch.tensor([logprob]), torch.tensor([ref_logprob]), estimator).item() >= -1e-6


def test_another_estimator_is_refused_by_name():
    with pytest.raises(ValueError, match=r"kl_estimator='k4'.*k1, k2, k3.*--kl_estimator"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


# Weights: sampler against trainer


def weighed(correction, ratios, *, cap=2.0, old_ratios=None, mask=None, **options):
    """Weights and metrics of one completion whose tokens the trainer finds `ratios` times as likely as the sampler."""
    sampled = torch.full((1, len(ratios)), -1.5)
    everything = torch.ones(sampled.shape, dtype=torch.bool)
    minibatch = Rollouts(
        rows=torch.tensor([0]),
        prompt_ids=torch.tensor([[5]]),
        prompt_mask=torch.tensor([[True]]),
        completion_ids=torch.full(sampled.shape, 7),
        completion_mask=everything,
        loss_mask=everything if mask is None else torch.tensor([mask]),
        truncated=torch.tensor([False]),
        sampling_logprobs=sampled,
        old_logprobs=None if old_ratios is None else sampled + torch.tensor([old_ratios]).log(),
    )
    logprobs = (sampled + torch.tensor([ratios]).log()).requires_grad_()
    weights, metrics = importance_weights(logprobs, minibatch, correction=correction, cap=cap, **options)
    assert not weights.requires_grad and not any(value.requires_grad for value in metrics.values())
    return weights, metrics


@pytest.mark.parametrize(
    ("correction", "expected", "cut"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]),
        ("truncate", [1.0, 0.25, 2.0, 1.5], [0.0, 0.0, 1.0, 0.0]),
        ("mask", [1.0, 0.0, 0.0, 1.5], [0.0, 1.0, 1.0, 0.0]),  # what differs by too much, in either direction
    ],
)
def test_weights_by_hand(correction, expected, cut):
    weights, metrics = weighed(correction, [1.0, 0.25, 8.0, 1.5])
    torch.testing.assert_close(weights, torch.tensor([expected]))
    torch.testing.assert_close(metrics["sampler/weight"], torch.tensor([[1.0, 0.25, 8.0, 1.5]]))
    assert metrics["sampler/weight_cut"].tolist() == [cut]


def test_the_weight_is_that_of_the_policy_that_sampled_not_of_the_one_being_updated():
    weights, _ = weighed("truncate", [8.0, 0.1], old_ratios=[1.5, 0.5])
    torch.testing.assert_close(weights, torch.tensor([[1.5, 0.5]]))


@pytest.mark.parametrize(("correction", "expected"), [("none", 1.0), ("truncate", 2.0), ("mask", 0.0)])
def test_a_completion_has_the_product_of_its_tokens_that_are_trained_on(correction, expected):
    weights, metrics = weighed(correction, [2.0, 0.75, 2.0, 50.0], mask=[True, True, True, False], of_completions=True)
    assert weights.tolist() == [[expected]]
    torch.testing.assert_close(metrics["sampler/weight"], torch.tensor([[3.0]]))
    assert metrics["sampler/weight_cut"].tolist() == [[1.0]]


def test_weights_of_log_probs_far_apart_stay_finite():
    weights, metrics = weighed("truncate", [1e30, 1e-30], cap=1e30)
    assert weights.isfinite().all() and metrics["sampler/weight"].isfinite().all()


@pytest.mark.parametrize(
    ("setting", "dtype", "device", "expected"),
    [
        ("auto", torch.float32, "cpu", "none"),
        ("auto", torch.bfloat16, "cpu", "none"),
        ("auto", torch.float32, "cuda", "none"),
        ("auto", torch.bfloat16, "cuda", "truncate"),
        ("none", torch.bfloat16, "cuda", "none"),
        ("mask", torch.float32, "cpu", "mask"),
    ],
)
def test_the_default_corrects_where_rounding_is_coarse(setting, dtype, device, expected):
    assert chosen_correction(setting, dtype, torch.device(device)) == expected


# What is reported


def test_metrics_carry_no_gradient_and_the_loss_leaves_them_as_they_were():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old, sampling = torch.tensor([[-1.5, -2.0]]), torch.tensor([[-1.25, -2.5]])
    advantages = torch.tensor([[1.0, 1.0]])
    ratio = importance_ratio(logprobs, old)
    clipped = clipped_tokens(ratio, advantages, 0.2, 0.2)
    metrics = policy_metrics(ratio, clipped, torch.tensor([[0.7, 0.1]]), logprobs, sampling)
    before = {name: value.clone() for name, value in metrics.items()}
    clipped_surrogate(ratio, advantages, 0.2, 0.2).sum().backward()
    with torch.no_grad():
        logprobs -= 1.0
    assert not any(value.requires_grad for value in metrics.values())
    for name, value in metrics.items():
        assert value.shape == (1, 2) and torch.equal(value, before[name]), name
    assert metrics["policy/ratio"].tolist() == [pytest.approx([1.6487, 1.0], abs=1e-4)]
    assert metrics["policy/clip_fraction"].tolist() == [[1.0, 0.0]]
    assert metrics["entropy"].tolist() == [pytest.approx([0.7, 0.1])]
    assert metrics["first/policy/first_ratio"].tolist() == metrics["policy/ratio"].tolist()


def test_the_difference_to_the_sampler_is_its_size_whatever_its_sign():
    logprobs, sampling = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.25, -1.5]])
    metrics = policy_metrics(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), logprobs, sampling)
    assert metrics["first/sampler/logprob_diff"].tolist() == [[0.25, 0.5]]


# Token weights: what the mean is over


def weights_of(mask, average_over, *, num_rows=None, num_tokens=None, max_completion_length=20):
    """Weights of a mini-batch of exactly these rows, unless told otherwise."""
    return token_weights(
        mask,
        average_over=average_over,
        num_rows=len(mask) if num_rows is None else num_rows,
        num_tokens=int(mask.sum()) if num_tokens is None else num_tokens,
        max_completion_length=max_completion_length,
    )


def mask_of(lengths: list[int], width: int | None = None) -> torch.Tensor:
    return torch.arange(width or max(*lengths, 1))[None, :] < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize(
    ("average_over", "mean"),
    [
        ("tokens", 1.9),  # (1 x 1 + 9 x 2) / 10
        ("rows", 1.5),  # (1 + 2) / 2
        ("constant", 0.475),  # (1 x 1 + 9 x 2) / (20 x 2)
    ],
)
def test_the_mean_of_a_row_of_one_token_and_a_row_of_nine(average_over, mean):
    mask = mask_of([1, 9])
    loss = torch.tensor([[1.0] * 9, [2.0] * 9])
    assert (weights_of(mask, average_over) * loss).sum().item() == pytest.approx(mean)


@pytest.mark.parametrize("average_over", ["tokens", "rows", "constant"])
def test_rows_that_were_left_out_still_count(average_over):
    """Two rows of three and five tokens; the second has no advantage. Alone, the first weighs as much as beside it."""
    both = weights_of(mask_of([3, 5]), average_over)
    alone = weights_of(mask_of([3]), average_over, num_rows=2, num_tokens=8)
    torch.testing.assert_close(both[:1, :3], alone)


lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any)


@settings(max_examples=60, deadline=None)
@given(lengths_of_rows, st.integers(0, 5))
def test_weights_sum_to_one_over_the_minibatch_and_are_zero_at_padding(lengths, extra_width):
    mask = mask_of(lengths, 6 + extra_width)
    for average_over in ("tokens", "rows"):
        weights = weights_of(mask, average_over, num_rows=sum(length > 0 for length in lengths))
        assert weights.dtype == torch.float32 and weights.shape == mask.shape
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
        assert (weights[~mask] == 0).all() and (weights[mask] > 0).all()
    constant = weights_of(mask, "constant", max_completion_length=6)
    assert constant.sum().item() == pytest.approx(sum(lengths) / (6 * len(lengths)), rel=1e-5)
    assert (constant[~mask] == 0).all()


@settings(max_examples=60, deadline=None)
@given(lengths_of_rows, st.sampled_from(["tokens", "rows", "constant"]), st.randoms(use_true_random=False))
def test_no_split_of_a_minibatch_changes_its_gradient(lengths, average_over, random):
    """Over 1, 2, 4 or all micro-batches or processes, in any order: each uses the counts of the mini-batch."""
    mask = mask_of(lengths, 6)
    values = torch.linspace(-2, 3, mask.numel(), dtype=torch.float64).reshape(mask.shape)
    counts = {"num_rows": len(lengths), "num_tokens": sum(lengths)}

    def gradient(parts: list[list[int]]) -> float:
        parameter = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        for rows in parts:
            width = max(*(lengths[row] for row in rows), 1, 1)
            weights = weights_of(mask[rows][:, :width], average_over, **counts)
            (weights.double() * (parameter * values[rows][:, :width]).sin()).sum().backward()
        return parameter.grad.item()

    order = random.sample(range(len(lengths)), len(lengths))
    whole = gradient([list(range(len(lengths)))])
    for num_parts in (1, 2, 4, len(lengths)):
        parts = [order[start::num_parts] for start in range(num_parts)]
        assert gradient([part for part in parts if part]) == pytest.approx(whole, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("average_over", ["tokens", "rows", "constant"])
def test_a_minibatch_of_truncated_rows_alone_weighs_nothing(average_over):
    weights = weights_of(torch.zeros(3, 4, dtype=torch.bool), average_over, num_rows=0, num_tokens=0)
    assert weights.tolist() == [[0.0] * 4] * 3


def test_truncated_rows_weigh_nothing_and_do_not_dilute_the_others():
    """Of rows with 2 and 4 tokens the second was cut off: the mean over what is left is that of the first alone."""
    mask = mask_of([2, 0], 4)
    for average_over in ("tokens", "rows"):
        assert weights_of(mask, average_over, num_rows=1).tolist() == [[0.5, 0.5, 0.0, 0.0], [0.0] * 4]


def test_long_completions_weigh_more_over_tokens_and_the_same_over_rows():
    mask = mask_of([1, 9])
    assert weights_of(mask, "tokens").sum(1).tolist() == pytest.approx([0.1, 0.9])
    assert weights_of(mask, "rows").sum(1).tolist() == pytest.approx([0.5, 0.5])
    assert weights_of(mask, "constant")[mask].unique().tolist() == pytest.approx([1 / 40])


def test_another_average_is_refused_by_name():
    with pytest.raises(ValueError, match=r"average_over='sequences'.*tokens, rows, constant.*--average_over"):
        weights_of(mask_of([1]), "sequences")


def test_everything_stays_finite_in_float32_at_the_cut():
    assert importance_ratio(torch.tensor([50.0]), torch.tensor([0.0])).item() == pytest.approx(math.exp(20), rel=1e-5)
