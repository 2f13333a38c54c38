"""What each algorithm's real step expects to do, against exact gradients: no sampling, every completion is enumerated.

A step samples, scores, makes advantages and losses as in training; only its sampler gives every completion, or every
group of completions, once, weighed by its probability. So what reaches the optimizer is the expectation of the
algorithm's estimator, and it is compared with minus the gradient of an objective, to 1e-5 of its norm.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from CISPO.cispo_trainer import CISPOTrainer
from common.losses import clipped_surrogate, importance_ratio, sequence_ratio
from DAPO.dapo_trainer import DAPOTrainer
from Distill.distill_trainer import DistillTrainer
from GRPO.grpo_trainer import GRPOTrainer
from GSPO.gspo_trainer import GSPOTrainer
from PPO.ppo_trainer import PPOTrainer
from RAFT.raft_trainer import RAFTTrainer
from Reinforce.reinforce_trainer import ReinforceTrainer
from ReMax.remax_trainer import ReMaxTrainer
from RLOO.rloo_trainer import RLOOTrainer
from tests.enumeration import END, Enumeration, save_four_token_model
from VinePPO.vineppo_trainer import VinePPOTrainer

KL_COEF = 0.3

# The sum over a completion's tokens, up to a constant that `step_gradients` takes out again.
TOKENS = {"average_over": "constant"}
GROUP = {"num_generations": 2}
PPO = {"value_init": "zero_head", "value_clip_range": None} | TOKENS
DR_GRPO = {"scale_by_std": False, "kl_place": "reward"} | TOKENS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_four_token_model(tmp_path_factory.mktemp("four tokens"))


@pytest.fixture(scope="module")
def world(folder):
    """All 40 completions of at most three tokens."""
    return Enumeration(folder, max_length=3)


@pytest.fixture(scope="module")
def small_world(folder):
    """All 13 completions of at most two tokens, few enough for groups of three."""
    return Enumeration(folder, max_length=2)


def gradient_of_step(world, kind, folder, **settings):
    """What the one optimizer step of a step expects."""
    (gradient,) = world.step_gradients(world.trainer(kind, folder, **settings))
    return gradient


def difference(gradient, expected):
    """Relative to the expected one."""
    return float((gradient - expected).norm() / expected.norm())


def unit(vector):
    return vector / vector.norm()


def objective(world, kl_coef=0.0):
    """What is to be maximised: E[score] - kl_coef KL(policy || reference)."""
    return (world.probabilities * world.scores).sum() - kl_coef * world.kl


def test_the_enumeration_is_complete_and_its_policy_has_left_the_reference(world, small_world):
    assert [len(some.ids) for some in (world, small_world)] == [1 + 3 + 9 + 27, 1 + 3 + 9]
    for some in (world, small_world):
        assert some.probabilities.sum().item() == pytest.approx(1, abs=1e-12)
        assert len(set(some.scores.tolist())) == len(some.ids)
    assert world.kl > 0.1
    assert world.gradient(objective(world)).norm() > 0.1


# The gradient of the KL to a teacher: of whole completions, or state by state


@pytest.fixture(scope="module")
def teaching(tmp_path_factory):
    """The enumeration whose reference is a teacher: another random model over the four tokens."""
    folder = save_four_token_model(tmp_path_factory.mktemp("teacher"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight += 0.3 * torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(3))
    model.save_pretrained(folder)
    return Enumeration(folder, max_length=3)


def distilled(world, teaching, folder, **settings):
    return gradient_of_step(world, DistillTrainer, folder, **TOKENS | {"teacher": str(teaching.folder)} | settings)


def kl_to_teacher(world, teaching):
    """Of whole completions."""
    return (world.probabilities * (world.logprobs - teaching.ref_logprobs)).sum()


@pytest.mark.parametrize("size", [1, 2])
def test_distillation_expects_the_gradient_of_the_kl_of_completions_or_at_each_state_as_given(
    world, teaching, tmp_path, size
):
    """With one completion there is no baseline, with two the other one's tokens are."""
    of_states = sum_over_states(world, kl_between(world.policy_logits, teaching.ref_logits))
    expected = {1.0: world.gradient(kl_to_teacher(world, teaching)), 0.0: world.gradient(of_states)}
    for gamma, gradient in expected.items():
        found = distilled(world, teaching, tmp_path / str(gamma), gamma=gamma, num_generations=size)
        assert difference(found, gradient) < 1e-5
    assert difference(expected[0.0], expected[1.0]) > 0.1


def test_a_score_and_a_kl_to_the_reference_beside_the_teacher_add_their_own_gradients(world, teaching, tmp_path):
    settings = GROUP | {"gamma": 1.0, "reward_coef": 0.7, "kl_coef": KL_COEF}
    gradient = distilled(world, teaching, tmp_path, **settings)
    assert (
        difference(
            gradient, world.gradient(kl_to_teacher(world, teaching) - 0.7 * objective(world) + KL_COEF * world.kl)
        )
        < 1e-5
    )
    assert difference(gradient, world.gradient(kl_to_teacher(world, teaching))) > 0.1


# The gradient of E[score], and of E[score] - kl_coef KL with the KL in the reward


UNBIASED = {
    "reinforce": (ReinforceTrainer, TOKENS),
    "remax": (ReMaxTrainer, TOKENS),
    "rloo": (RLOOTrainer, GROUP),
    "rloo, ratio of tokens": (RLOOTrainer, GROUP | TOKENS | {"ratio_level": "token"}),
    "ppo, lambda 1": (PPOTrainer, PPO | {"gae_lambda": 1.0}),
}


@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
@pytest.mark.parametrize(("kind", "settings"), UNBIASED.values(), ids=UNBIASED)
def test_a_step_expects_exactly_the_gradient_of_score_less_kl(world, tmp_path, kind, settings, kl_coef):
    gradient = gradient_of_step(world, kind, tmp_path, kl_coef=kl_coef, **settings)
    assert difference(gradient, -world.gradient(objective(world, kl_coef))) < 1e-5
    # The test sees a KL that is missing, and one that is too much.
    assert difference(gradient, -world.gradient(objective(world, KL_COEF - kl_coef))) > 0.1


def test_leave_one_out_of_three_expects_exactly_the_gradient_of_score_less_kl(small_world, tmp_path):
    gradient = gradient_of_step(small_world, RLOOTrainer, tmp_path, num_generations=3, kl_coef=KL_COEF)
    assert difference(gradient, -small_world.gradient(objective(small_world, KL_COEF))) < 1e-5


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("group_size", [2, 3])
def test_dr_grpo_expects_the_gradient_of_score_less_kl_times_the_share_of_the_others(
    small_world, tmp_path, group_size, sparse
):
    """The group's mean holds the completion's own score, so (G - 1) / G of the gradient is left."""
    settings = DR_GRPO | {"num_generations": group_size, "sparse": sparse, "kl_coef": KL_COEF}
    gradient = gradient_of_step(small_world, GRPOTrainer, tmp_path, **settings)
    share = (group_size - 1) / group_size
    assert difference(gradient, -share * small_world.gradient(objective(small_world, KL_COEF))) < 1e-5


def test_the_group_baseline_of_reinforce_leaves_that_share_of_the_score_and_all_of_the_kl(world, tmp_path):
    settings = GROUP | TOKENS | {"group_baseline": True, "kl_coef": KL_COEF}
    gradient = gradient_of_step(world, ReinforceTrainer, tmp_path, **settings)
    assert difference(gradient, -world.gradient(objective(world) / 2 - KL_COEF * world.kl)) < 1e-5


def test_what_is_trained_is_the_policy_at_the_temperature_it_samples_at(folder, tmp_path):
    world = Enumeration(folder, max_length=3, temperature=0.6)
    gradient = gradient_of_step(world, ReinforceTrainer, tmp_path, kl_coef=KL_COEF, **TOKENS)
    assert difference(gradient, -world.gradient(objective(world, KL_COEF))) < 1e-5


def test_the_penalty_for_a_missing_end_is_part_of_the_objective(world, tmp_path):
    gradient = gradient_of_step(world, ReinforceTrainer, tmp_path, missing_eos_penalty=0.7, **TOKENS)
    ended = torch.tensor([ids[-1] == END for ids in world.ids])
    penalty = 0.7 * (world.probabilities * ~ended).sum()
    assert difference(gradient, -world.gradient(objective(world) - penalty)) < 1e-5


def test_remax_subtracts_the_score_of_the_greedy_completion(world, tmp_path):
    """No baseline biases the expectation, so that it is the right one has to be looked at apart from it."""
    trainer = world.trainer(ReMaxTrainer, tmp_path, **TOKENS)
    world.step_gradients(trainer)
    metrics = trainer.metrics.reduce(trainer.accelerator)
    assert metrics["baseline"] == pytest.approx(float(world.scores[world.greedy]), abs=1e-6)


# GRPO as the paper has it: what the two divisions do to the expectation


def advantages_of_pairs(scores):
    """(N, N): the advantage of each completion in a group with each other one."""
    gap = scores[:, None] - scores[None, :]
    return (gap / 2) / (gap.abs() / 2**0.5 + 1e-4)  # the deviation of two numbers is their distance / sqrt(2)


def test_grpo_of_pairs_expects_the_gradient_of_the_scaled_win_over_a_frozen_copy(world, tmp_path):
    """Divided by its deviation a pair's difference is nearly its sign: who wins counts, not by how much."""
    gradient = gradient_of_step(world, GRPOTrainer, tmp_path, **GROUP | TOKENS)
    advantage, opponent = advantages_of_pairs(world.scores), world.probabilities.detach()
    assert difference(gradient, -world.gradient(world.probabilities @ advantage @ opponent)) < 1e-5
    assert difference(unit(gradient), -unit(world.gradient(objective(world)))) > 0.1


def test_grpo_of_pairs_with_right_or_wrong_expects_the_gradient_of_accuracy_times_a_constant(folder, tmp_path):
    world = Enumeration(folder, max_length=3)
    world.scores = (world.scores > 0.3).double()
    gradient = gradient_of_step(world, GRPOTrainer, tmp_path, **GROUP | TOKENS)
    scale = 0.5 / (0.5**0.5 + 1e-4)  # every pair that differs has scores 0 and 1
    assert difference(gradient, -scale * world.gradient(objective(world))) < 1e-5


def test_a_mean_over_rows_divides_what_each_completion_says_by_its_length(world, tmp_path):
    """Which is why Dr. GRPO leaves it: the expectation is no longer along the gradient of the score."""
    settings = DR_GRPO | GROUP | {"average_over": "rows"}
    gradient = gradient_of_step(world, GRPOTrainer, tmp_path, **settings)
    probabilities = world.probabilities.detach()
    advantage = 0.5 * (world.scores - probabilities @ world.scores)
    per_length = (probabilities * advantage / world.mask.sum(1) * world.logprobs).sum()
    assert difference(gradient, -world.gradient(per_length)) < 1e-5
    assert difference(unit(gradient), -unit(world.gradient(objective(world)))) > 0.05


# GSPO, CISPO and DAPO: the first optimizer step, and the second one, where their ratios and clips differ


def pairs_of(world, scores):
    """(N,): the mean advantage of each completion, times its probability; and the advantages of both signs alone."""
    probabilities, advantage = world.probabilities.detach(), advantages_of_pairs(scores)
    return [
        probabilities * (part @ probabilities) for part in (advantage, advantage.clamp(min=0), -advantage.clamp(max=0))
    ]


def surrogate(ratio, gains, losses, low, high):
    """The clipped surrogate: good ones up to 1 + high, bad ones down to 1 - low; all in one shape, or (N, 1)."""
    return (gains * ratio.clamp(max=1 + high) - losses * ratio.clamp(min=1 - low)).sum()


CLIPS = {"clip_range": 0.1, "clip_range_high": 0.4, "num_update_epochs": 2}


def test_gspo_clips_the_geometric_mean_of_each_completions_ratios(world, another, tmp_path):
    trainer = world.trainer(GSPOTrainer, tmp_path, **GROUP | CLIPS)
    first, second = world.step_gradients(trainer, move_to=another.weights)
    mean, gains, losses = pairs_of(world, world.scores)
    lengths = world.mask.sum(1)
    assert difference(first, -world.gradient((mean * world.logprobs / lengths).sum())) < 1e-5
    log_ratio = another.logprobs - world.logprobs.detach()
    ratio = (log_ratio / lengths).exp()
    assert (ratio > 1.4).any() and (ratio < 0.9).any() and ((ratio > 1.1) & (ratio < 1.4)).any()
    assert difference(second, -another.gradient(surrogate(ratio, gains, losses, 0.1, 0.4))) < 1e-5
    # The test sees the ratio of RLOO, which is their product, and a clip as wide on both sides.
    assert difference(second, -another.gradient(surrogate(log_ratio.exp(), gains, losses, 0.1, 0.4))) > 0.1
    assert difference(second, -another.gradient(surrogate(ratio, gains, losses, 0.1, 0.1))) > 0.01


def test_cispo_weighs_every_token_by_its_clipped_ratio_and_drops_none(world, another, tmp_path):
    settings = GROUP | TOKENS | CLIPS | {"clip_range": 1.0}
    first, second = world.step_gradients(world.trainer(CISPOTrainer, tmp_path, **settings), move_to=another.weights)
    mean, gains, losses = pairs_of(world, world.scores)
    assert difference(first, -world.gradient(mean @ world.logprobs)) < 1e-5
    ratio = (another.token_logprobs - world.token_logprobs.detach()).exp()  # (N, T)
    weights = ratio.detach().clamp(max=1.4)
    assert ((ratio > 1.4) & world.mask).any() and ((ratio < 0.9) & world.mask).any()
    assert difference(second, -another.gradient(mean @ (weights * another.token_logprobs).sum(1))) < 1e-5
    clipped = surrogate(ratio, gains[:, None], losses[:, None], 0.999, 0.4)  # which gives cut tokens no gradient
    assert difference(second, -another.gradient(clipped)) > 0.1


def test_dapo_pays_for_length_and_clips_each_token_later_above_than_below(world, another, tmp_path):
    settings = GROUP | TOKENS | CLIPS | {"overlong_buffer": 2, "overlong_penalty": 0.8}
    first, second = world.step_gradients(world.trainer(DAPOTrainer, tmp_path, **settings), move_to=another.weights)
    penalties = torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64)[world.mask.sum(1) - 1]
    mean, gains, losses = pairs_of(world, world.scores - penalties)
    assert difference(first, -world.gradient(mean @ world.logprobs)) < 1e-5
    free, *_ = pairs_of(world, world.scores)
    assert difference(first, -world.gradient(free @ world.logprobs)) > 0.1
    ratio = (another.token_logprobs - world.token_logprobs.detach()).exp()  # (N, T)
    gains, losses = gains[:, None], losses[:, None]
    assert difference(second, -another.gradient(surrogate(ratio, gains, losses, 0.1, 0.4))) < 1e-5
    assert difference(second, -another.gradient(surrogate(ratio, gains, losses, 0.1, 0.1))) > 1e-3


# PPO: which values bias it


def ppo_gradient(world, folder, values, **settings):
    """The gradient of a step of PPO whose value model says `values`: a number for each state."""
    trainer = world.trainer(PPOTrainer, folder, **PPO | settings)
    with trainer.models.use("value") as model:

        def looked_up(sequences):
            states, found = {}, []  # the tokens of each row so far
            for place, token in zip(sequences.places.tolist(), sequences.targets.tolist(), strict=True):
                state = states.setdefault(place // sequences.shape[1], ())
                found.append(values[state])
                states[place // sequences.shape[1]] = (*state, token)
            return torch.tensor(found) + 0 * model.head.bias  # what the value model's own step asks a gradient of

        model.forward = looked_up
    (gradient,) = world.step_gradients(trainer)
    return gradient


@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_ppo_with_exact_values_expects_the_gradient_at_every_lambda(world, tmp_path, gae_lambda, kl_coef):
    values = world.values(kl_coef)
    gradient = ppo_gradient(world, tmp_path, values, gae_lambda=gae_lambda, kl_coef=kl_coef)
    assert difference(gradient, -world.gradient(objective(world, kl_coef))) < 1e-5


def test_ppo_with_wrong_values_is_unbiased_at_lambda_one_and_biased_below(world, tmp_path):
    exact = world.values(kl_coef=0.0)
    noise = torch.randn(len(exact), generator=torch.Generator().manual_seed(0)).tolist()
    wrong = {state: value + error for (state, value), error in zip(exact.items(), noise, strict=True)}
    bias = [
        difference(
            ppo_gradient(world, tmp_path / str(gae_lambda), wrong, gae_lambda=gae_lambda),
            -world.gradient(objective(world)),
        )
        for gae_lambda in (1.0, 0.95, 0.5, 0.0)
    ]
    assert bias[0] < 1e-5 and bias[1] > 0.01 and bias[3] > 0.3
    assert all(less < more for less, more in pairwise(bias))


# RAFT


@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
def test_raft_expects_the_gradient_of_the_loglikelihood_of_the_best_of_two(world, tmp_path, kl_coef):
    gradient = gradient_of_step(world, RAFTTrainer, tmp_path, kl_coef=kl_coef, **GROUP | TOKENS)
    merit = world.scores - kl_coef * (world.logprobs - world.ref_logprobs).detach()
    rank = merit.argsort().argsort()
    # The best of two is completion i if none is better, less the chance that both are worse.
    probabilities = world.probabilities.detach()
    at_most = torch.stack([probabilities[rank <= r].sum() for r in rank])
    is_best = at_most.square() - (at_most - probabilities).square()  # (N,), sums to 1
    assert difference(gradient, -world.gradient((is_best * world.logprobs).sum())) < 1e-5


# The KL as a term of the loss, alone: all scores are equal

IN_LOSS = {"kl_coef": KL_COEF, "kl_place": "loss"} | TOKENS
WITH_KL_IN_LOSS = {
    "grpo": (GRPOTrainer, GROUP | IN_LOSS),
    "ppo": (PPOTrainer, PPO | IN_LOSS),
    "vineppo": (VinePPOTrainer, GROUP | IN_LOSS),  # a chunk is a whole completion
}
in_every_loss = pytest.mark.parametrize(("kind", "settings"), WITH_KL_IN_LOSS.values(), ids=WITH_KL_IN_LOSS)


def kl_gradient(folder, tmp_path, estimator, kind=GRPOTrainer, settings=WITH_KL_IN_LOSS["grpo"][1]):
    world = Enumeration(folder, max_length=3)
    world.scores = torch.zeros_like(world.scores)
    trainer = world.trainer(kind, tmp_path, **settings)
    trainer.config.kl_estimator = estimator  # the configuration refuses k1
    (gradient,) = world.step_gradients(trainer)
    return world, gradient / KL_COEF


def sum_over_states(world, kl_of_state):
    """E[sum over the states of a completion], where the states are where the policy as it is now comes to."""
    visits = world.probabilities.detach()[:, None] * world.mask  # (N, T)
    return (visits * kl_of_state).sum()


def kl_between(logprobs, other):
    """(N, T): KL between two distributions of the next token, in each state."""
    return (logprobs.exp() * (logprobs - other)).sum(-1)


def kl_of_states(world):
    """What k3 in the loss brings down: KL(reference || policy) of each state where the policy comes to."""
    return sum_over_states(world, kl_between(world.ref_logits, world.policy_logits))


def test_k1_in_the_loss_has_no_gradient_which_is_why_it_is_refused(folder, tmp_path):
    world, gradient = kl_gradient(folder, tmp_path, "k1")
    assert gradient.norm() < 1e-5 * world.gradient(world.kl).norm()


@in_every_loss
def test_k2_in_the_loss_has_the_gradient_of_the_kl_of_each_state_where_the_policy_comes_to(
    folder, tmp_path, kind, settings
):
    """Not that of the KL of completions: no token is blamed for the states it leads to."""
    world, gradient = kl_gradient(folder, tmp_path, "k2", kind, settings)
    of_states = sum_over_states(world, kl_between(world.policy_logits, world.ref_logits))
    assert of_states.item() == pytest.approx(world.kl.item(), rel=1e-9)  # the same value, and yet
    assert difference(gradient, world.gradient(of_states)) < 1e-5
    assert difference(gradient, world.gradient(world.kl)) > 0.05


@in_every_loss
@pytest.mark.parametrize("estimator", [None, "k3"])
def test_k3_in_the_loss_has_the_gradient_of_the_reverse_kl_of_each_state_where_the_policy_comes_to(
    folder, tmp_path, kind, settings, estimator
):
    """KL(reference || policy), the other way round than its name in the papers says."""
    world, gradient = kl_gradient(folder, tmp_path, estimator, kind, settings)
    assert difference(gradient, world.gradient(kl_of_states(world))) < 1e-5
    right_way = sum_over_states(world, kl_between(world.policy_logits, world.ref_logits))
    assert difference(gradient, world.gradient(right_way)) > 0.05


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_ppo_with_the_kl_in_the_loss_expects_the_gradient_of_the_score_less_that_of_the_loss(
    world, tmp_path, gae_lambda
):
    """The values are those of the score alone, since no token pays for its KL."""
    values = world.values(kl_coef=0.0)
    gradient = ppo_gradient(world, tmp_path, values, gae_lambda=gae_lambda, **IN_LOSS)
    expected = -world.gradient(objective(world)) + KL_COEF * world.gradient(kl_of_states(world))
    assert difference(gradient, expected) < 1e-5
    assert difference(gradient, -world.gradient(objective(world, KL_COEF))) > 0.01  # the KL in the reward is another


# Off-policy: the second optimizer step on the same completions


def bias_of_second_step(world, folder, **settings):
    """How far the second optimizer step on the same completions is from the gradient where the policy then is."""
    newer = Enumeration(world.folder, max_length=3, seed=1)
    clipped_nowhere = {"clip_range": 0.999, "clip_range_high": 1e6}
    trainer = world.trainer(RLOOTrainer, folder, num_update_epochs=2, **GROUP | clipped_nowhere | settings)
    _, second = world.step_gradients(trainer, move_to=newer.weights)
    return difference(second, -newer.gradient((newer.probabilities * world.scores).sum()))


def test_the_ratio_of_completions_makes_up_exactly_for_what_an_older_policy_sampled(world, tmp_path):
    assert bias_of_second_step(world, tmp_path) < 1e-5


def test_the_ratio_of_tokens_does_not(world, tmp_path):
    """It leaves out that the newer policy comes to the states before them more or less often."""
    assert bias_of_second_step(world, tmp_path, ratio_level="token", **TOKENS) > 0.1


# A sampler that does not draw from the policy as the trainer computes it

CORRECTED = {"importance_correction": "truncate", "importance_cap": 1e8, "max_logprob_diff": 0}
UNCORRECTED = {"importance_correction": "none", "max_logprob_diff": 0}


def gradient_with_sampler(world, sampler, kind, folder, **settings):
    (gradient,) = world.step_gradients(world.trainer(kind, folder, **settings), sampler=sampler)
    return gradient


@pytest.fixture(scope="module")
def one_token(folder):
    """All four completions of one token under a policy, and under another one that the sampler draws from."""
    return Enumeration(folder, max_length=1), Enumeration(folder, max_length=1, seed=1)


@pytest.fixture(scope="module")
def another(folder):
    """The policy that the sampler draws completions of three tokens from."""
    return Enumeration(folder, max_length=3, seed=1)


OF_TOKENS = UNBIASED | {
    "dr. grpo": (GRPOTrainer, GROUP | DR_GRPO),
    "vineppo": (VinePPOTrainer, GROUP | TOKENS),  # the group's others are the value of the prompt
}


@pytest.mark.parametrize(("kind", "settings"), OF_TOKENS.values(), ids=OF_TOKENS)
def test_the_weight_of_a_token_makes_up_exactly_for_a_sampler_that_chooses_it_otherwise(
    one_token, tmp_path, kind, settings
):
    world, sampler = one_token
    share = 0.5 if kind is GRPOTrainer else 1.0  # see above: a group's mean holds the completion's own score
    expected = -share * world.gradient(objective(world))
    gradients = [
        gradient_with_sampler(world, sampler, kind, tmp_path / str(number), **settings | correction)
        for number, correction in enumerate((CORRECTED, UNCORRECTED))
    ]
    assert difference(gradients[0], expected) < 1e-5 < 0.1 < difference(gradients[1], expected)


def test_the_weight_of_a_token_corrects_the_kl_in_the_loss_too(one_token, tmp_path):
    world, sampler = one_token
    gradients = [
        gradient_with_sampler(world, sampler, GRPOTrainer, tmp_path / str(coef), **GROUP | CORRECTED | IN_LOSS | coef)
        for coef in ({}, {"kl_coef": 2 * KL_COEF})
    ]
    kl = (gradients[1] - gradients[0]) / KL_COEF
    assert difference(kl, world.gradient(kl_of_states(world))) < 1e-5


def test_the_weight_of_completions_makes_up_exactly_for_what_another_policy_sampled(world, another, tmp_path):
    """Those of tokens do not: the sampler comes to the states before them more or less often."""
    settings = {
        "completions": GROUP | CORRECTED,
        "tokens": GROUP | TOKENS | CORRECTED | {"ratio_level": "token"},
        "none": GROUP | UNCORRECTED,
    }
    bias = [
        difference(
            gradient_with_sampler(world, another, RLOOTrainer, tmp_path / name, **each),
            -world.gradient(objective(world)),
        )
        for name, each in settings.items()
    ]
    assert bias[0] < 1e-5 < 0.1 < min(bias[1:])


def test_the_weight_stays_that_of_the_policy_that_sampled_while_the_ratio_follows_the_update(world, another, tmp_path):
    newer, sampler = another, Enumeration(world.folder, max_length=3, seed=2)
    clipped_nowhere = {"clip_range": 0.999, "clip_range_high": 1e6, "num_update_epochs": 2}
    trainer = world.trainer(RLOOTrainer, tmp_path, **GROUP | CORRECTED | clipped_nowhere)
    _, second = world.step_gradients(trainer, move_to=newer.weights, sampler=sampler)
    assert difference(second, -newer.gradient((newer.probabilities * world.scores).sum())) < 1e-5


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_weights_are_cut_and_tokens_left_out_at_the_cap_and_nothing_else_changes(world, another, tmp_path, correction):
    cap = 1.25
    settings = TOKENS | CORRECTED | {"importance_correction": correction, "importance_cap": cap}
    gradient = gradient_with_sampler(world, another, ReinforceTrainer, tmp_path, **settings)
    weights = (world.token_logprobs - another.token_logprobs).detach().exp()
    if correction == "truncate":
        used = weights.clamp(max=cap)
    else:  # no other token gets more weight for it
        used = torch.where((weights > cap) | (weights < 1 / cap), 0.0, weights)
    assert ((used != weights) & world.mask).any() and (used == weights).any()
    expected = another.probabilities.detach() * world.scores @ (used * world.token_logprobs).sum(1)
    assert difference(gradient, -world.gradient(expected)) < 1e-5


# Completions of the policy of one step earlier

LAGGED = {"sampling_lag": 1, "num_steps": 1, "max_logprob_diff": 0, "clip_range": 0.999, "clip_range_high": 1e6}
SAMPLE_ONCE = {name: each for name, each in OF_TOKENS.items() if name not in ("remax", "vineppo")}


@pytest.mark.parametrize("correction", ["none", "truncate"])
@pytest.mark.parametrize(("kind", "settings"), SAMPLE_ONCE.values(), ids=SAMPLE_ONCE)
def test_with_a_lag_the_ratio_makes_up_once_for_the_policy_of_one_step_earlier(
    one_token, tmp_path, kind, settings, correction
):
    world, earlier = one_token
    share = 0.5 if kind is GRPOTrainer else 1.0  # see above: a group's mean holds the completion's own score
    expected = -share * world.gradient(objective(world, KL_COEF))
    settings = settings | LAGGED | {"kl_coef": KL_COEF, "importance_correction": correction, "importance_cap": 1e8}
    gradient = gradient_with_sampler(world, earlier, kind, tmp_path / "1", **settings)
    assert difference(gradient, expected) < 1e-5
    settings |= {"sampling_lag": 0, "importance_correction": "none"}
    assert difference(gradient_with_sampler(world, earlier, kind, tmp_path / "0", **settings), expected) > 0.1


def test_with_a_lag_the_ratio_of_completions_is_exact_for_score_and_kl_of_whole_completions(world, another, tmp_path):
    settings = GROUP | LAGGED | {"kl_coef": KL_COEF}
    gradient = gradient_with_sampler(world, another, RLOOTrainer, tmp_path, **settings)
    assert difference(gradient, -world.gradient(objective(world, KL_COEF))) < 1e-5


def test_with_a_lag_the_kl_in_the_loss_is_a_mean_over_what_the_policy_samples_now(one_token, tmp_path):
    world, earlier = one_token
    gradients = [
        gradient_with_sampler(world, earlier, GRPOTrainer, tmp_path / str(coef), **GROUP | IN_LOSS | LAGGED | coef)
        for coef in ({}, {"kl_coef": 2 * KL_COEF})
    ]
    kl = (gradients[1] - gradients[0]) / KL_COEF
    assert difference(kl, world.gradient(kl_of_states(world))) < 1e-5


OF_PAIRS = {"gspo": (GSPOTrainer, {}), "cispo": (CISPOTrainer, TOKENS), "dapo": (DAPOTrainer, TOKENS)}


@pytest.mark.parametrize("how", [LAGGED, CORRECTED], ids=["lag", "correction"])
@pytest.mark.parametrize(("kind", "settings"), OF_PAIRS.values(), ids=OF_PAIRS)
def test_ratio_or_weight_of_a_token_makes_up_for_its_choice_and_leaves_what_it_is_compared_with(
    one_token, tmp_path, kind, settings, how
):
    """The others of its group stay those that were sampled."""
    world, sampler = one_token
    gradient = gradient_with_sampler(world, sampler, kind, tmp_path, **GROUP | settings | how)
    advantage, others = advantages_of_pairs(world.scores), sampler.probabilities.detach()
    assert difference(gradient, -world.gradient(world.probabilities @ advantage @ others)) < 1e-5
    assert difference(gradient, -sampler.gradient(sampler.probabilities @ advantage @ others)) > 0.1


def test_the_weight_of_gspo_is_that_of_the_whole_completion_though_its_ratio_is_not(world, another, tmp_path):
    gradient = gradient_with_sampler(world, another, GSPOTrainer, tmp_path, **GROUP | CORRECTED)
    others = advantages_of_pairs(world.scores) @ another.probabilities.detach()  # (N,)
    expected = (world.probabilities.detach() * others * world.logprobs / world.mask.sum(1)).sum()
    assert difference(gradient, -world.gradient(expected)) < 1e-5


def test_the_ratios_have_the_gradient_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    old, logprobs, advantages = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(4) < torch.tensor([[4], [1], [2]])
    logprobs = (old + logprobs / 4).requires_grad_()  # ratios on both sides of the clip

    def loss(logprobs, ratio):
        return torch.where(mask, clipped_surrogate(ratio(logprobs), advantages, 0.2, 0.2), 0.0)

    of_gspo = partial(sequence_ratio, old_logprobs=old, mask=mask, per_token=True)
    for ratio in (lambda x: sequence_ratio(x, old, mask), of_gspo, lambda x: importance_ratio(x, old)):
        assert torch.autograd.gradcheck(lambda x, ratio=ratio: loss(x, ratio), logprobs)
    # Of the ratio itself: each real token of a completion moves the whole, and padding nothing.
    (gradient,) = torch.autograd.grad(sequence_ratio(logprobs, old, mask)[:, 0].sum(), logprobs)
    ratio = sequence_ratio(logprobs, old, mask).detach()
    torch.testing.assert_close(gradient, torch.where(mask, ratio, 0.0))
