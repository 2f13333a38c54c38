"""One optimizer step: the gradient of the whole mini-batch, clipped once, at the step's learning rate, or none."""

import math
from copy import deepcopy

import pytest
import torch
import transformers
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.config import RLConfig
from common.mistakes import WrongNumbers
from common.update.batches import Batches
from common.update.learner import Learner, metric_part

PEAK = 1e-3
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


class EqualProcesses:
    """Several processes that all have the same gradient: what is summed over them is a multiple."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return tensor * self.num_processes


class Weights(nn.Module):
    """Two parameters of different shapes, one that no gradient reaches unless asked, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.b = nn.Parameter(torch.tensor([[2.0], [2.0]]))
        self.unused = nn.Parameter(torch.tensor([[5.0]]))
        self.frozen = nn.Parameter(torch.tensor([7.0]), requires_grad=False)


def make_learner(**settings: object) -> tuple[Learner, Weights]:
    """A learner of Weights without clipping or decay, unless `settings` say otherwise."""
    weights = Weights()
    config = RLConfig(**({"learning_rate": PEAK, "max_grad_norm": 0.0, "num_steps": 12} | settings))
    return Learner("policy", weights, config), weights


def set_gradient(weights: Weights, a: list[float], b: float = 0.0) -> None:
    weights.a.grad = torch.tensor(a)
    weights.b.grad = torch.full((2, 1), b)


# The step


def test_the_first_step_moves_each_weight_by_the_learning_rate_against_its_gradient(accelerator):
    learner, weights = make_learner()
    set_gradient(weights, [3.0, -0.5], b=0.01)
    learner.optimizer_step(1, accelerator)
    assert weights.a.tolist() == pytest.approx([1 - PEAK, 1 + PEAK])
    assert weights.b.flatten().tolist() == pytest.approx([2 - PEAK, 2 - PEAK])
    assert weights.a.grad is None and weights.b.grad is None  # nothing is left for the next mini-batch


def test_the_step_uses_the_learning_rate_of_its_number(accelerator):
    learner, weights = make_learner(warmup_steps=4)
    set_gradient(weights, [1.0, 1.0])
    learner.optimizer_step(3, accelerator)
    assert weights.a.tolist() == pytest.approx([1 - 0.75 * PEAK] * 2)


def test_the_norm_that_is_reported_is_the_one_before_clipping(accelerator):
    learner, weights = make_learner(max_grad_norm=1.0, adam_beta1=0.9)
    set_gradient(weights, [3.0, 4.0])
    assert learner.optimizer_step(1, accelerator) == pytest.approx(5.0)
    momentum = learner.optimizer.state[weights.a]["exp_avg"]
    assert momentum.tolist() == pytest.approx([0.06, 0.08])  # a tenth of the gradient at norm 1


def test_gradients_below_the_limit_or_without_one_are_left_as_they_are(accelerator):
    for limit, gradient in ((10.0, [3.0, 4.0]), (0.0, [300.0, 400.0])):
        learner, weights = make_learner(max_grad_norm=limit)
        set_gradient(weights, gradient)
        learner.optimizer_step(1, accelerator)
        assert learner.optimizer.state[weights.a]["exp_avg"].tolist() == pytest.approx([g / 10 for g in gradient])


@pytest.mark.parametrize("num_parts", [1, 2, 4, 12])
def test_gradients_of_any_number_of_micro_batches_add_up_to_one_norm_and_one_step(accelerator, num_parts):
    """Clipping sees the sum, never a part of it, and nothing is divided by the number of parts."""
    inputs = torch.linspace(-1, 2, 24).reshape(12, 2)
    learner, weights = make_learner(max_grad_norm=0.1)
    for part in inputs.tensor_split(num_parts):
        ((part @ weights.a).square() / 12).sum().backward()
    norm = learner.optimizer_step(1, accelerator)
    whole = torch.linalg.vector_norm(2 * (inputs @ torch.ones(2))[:, None].mul(inputs).sum(0) / 12)
    assert norm == pytest.approx(whole.item(), rel=1e-5)
    momentum = learner.optimizer.state[weights.a]["exp_avg"]
    assert momentum.norm().item() == pytest.approx(0.01, rel=1e-4)


def test_only_what_requires_a_gradient_is_trained(accelerator):
    learner, weights = make_learner(weight_decay=0.5)
    assert [id(p) for p in learner.parameters] == [id(weights.a), id(weights.b), id(weights.unused)]
    set_gradient(weights, [1.0, 1.0])
    learner.optimizer_step(1, accelerator)
    assert weights.frozen.item() == 7.0


# Metrics of a micro-batch


MASK = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (torch.tensor([[1.0, 7.0, 7.0], [2.0, 3.0, 4.0], [math.nan] * 3]), [10.0, 4.0]),  # over tokens
        (torch.tensor([[2.0], [1.0], [math.inf]]), [3.0, 2.0]),  # over completions that are trained on
        ((torch.tensor([[1.0, 7.0, 7.0]] * 3), torch.tensor([[False, True, False]] * 3)), [21.0, 3.0]),  # its own
    ],
    ids=["tokens", "completions", "own mask"],
)
def test_a_metric_is_a_mean_over_tokens_over_completions_or_over_what_it_says(values, part):
    assert [number.item() for number in metric_part(values, MASK)] == part


def test_a_completion_of_one_token_is_one_token():
    assert [n.item() for n in metric_part(torch.tensor([[2.0], [4.0]]), torch.ones(2, 1, dtype=torch.bool))] == [6, 2]


# Nothing to learn


def test_a_gradient_of_zero_changes_nothing_at_all(accelerator):
    """Neither momentum nor weight decay moves a weight, and the optimizer's state stays to the last bit."""
    learner, weights = make_learner(weight_decay=0.1, max_grad_norm=1.0)
    set_gradient(weights, [1.0, -2.0], b=0.5)
    learner.optimizer_step(1, accelerator)
    before = [parameter.detach().clone() for parameter in learner.parameters]
    moments = {name: value.clone() for name, value in learner.optimizer.state[weights.a].items()}
    set_gradient(weights, [0.0, 0.0])
    assert learner.optimizer_step(2, accelerator) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))
    assert all(torch.equal(learner.optimizer.state[weights.a][name], value) for name, value in moments.items())


def test_no_gradient_at_all_is_a_gradient_of_zero(accelerator):
    learner, weights = make_learner(weight_decay=0.1)
    assert learner.optimizer_step(1, accelerator) == 0.0
    assert weights.a.tolist() == [1.0, 1.0] and not learner.optimizer.state


def test_a_step_without_signal_does_not_hold_the_schedule_up(accelerator):
    learner, weights = make_learner(warmup_steps=4)
    for step, gradient in ((1, [0.0, 0.0]), (2, [0.0, 0.0]), (3, [1.0, 1.0])):
        set_gradient(weights, gradient)
        learner.optimizer_step(step, accelerator)
    assert weights.a.tolist() == pytest.approx([1 - 0.75 * PEAK] * 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_ends_the_run_and_spoils_no_weight(accelerator, bad, limit):
    learner, weights = make_learner(max_grad_norm=limit)
    set_gradient(weights, [bad, 1.0])
    with pytest.raises(WrongNumbers, match=r"step 7: the gradient of policy is .*--learning_rate"):
        learner.optimizer_step(7, accelerator)
    assert weights.a.tolist() == [1.0, 1.0] and weights.b.flatten().tolist() == [2.0, 2.0]


# Several processes


def test_gradients_are_added_up_over_processes_and_not_averaged():
    learner, weights = make_learner()
    set_gradient(weights, [3.0, 4.0])
    assert learner.optimizer_step(1, EqualProcesses(2)) == pytest.approx(10.0)
    assert learner.optimizer.state[weights.a]["exp_avg"].tolist() == pytest.approx([0.6, 0.8])


def test_every_gradient_comes_back_to_its_own_parameter():
    learner, weights = make_learner()
    weights.a.grad, weights.b.grad = torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]])
    learner.optimizer_step(1, EqualProcesses(3))
    assert learner.optimizer.state[weights.a]["exp_avg"].tolist() == pytest.approx([0.3, 0.6])
    assert learner.optimizer.state[weights.b]["exp_avg"].flatten().tolist() == pytest.approx([0.9, 1.2])


def test_a_process_without_rows_takes_part():
    learner, weights = make_learner()
    assert learner.optimizer_step(1, EqualProcesses(2)) == 0.0
    assert weights.a.tolist() == [1.0, 1.0]


def test_a_weight_that_no_row_reached_is_treated_alike_on_any_number_of_processes(accelerator):
    after = []
    for processes in (accelerator, EqualProcesses(2)):
        learner, weights = make_learner(weight_decay=0.5)
        for step in (1, 2):
            set_gradient(weights, [1.0, 1.0])
            if step == 1:
                weights.unused.grad = torch.ones(1, 1)
            learner.optimizer_step(step, processes)
        after.append(weights.unused.item())
    assert after[0] == pytest.approx(after[1], rel=1e-6)


# Settings of the optimizer


def displacement(accelerator, gradients: list[float], **settings: float) -> float:
    """How far a weight has gone, in learning rates, after steps with these gradients."""
    learner, weights = make_learner(**settings)
    for step, gradient in enumerate(gradients, start=1):
        set_gradient(weights, [gradient, gradient])
        learner.optimizer_step(step, accelerator)
    return (weights.a[0].item() - 1) / PEAK


def test_the_first_moment_is_averaged_with_adam_beta1(accelerator):
    """Gradients 1 and -1: without momentum back to the start; with 0.9 the second step is -0.01 / 0.19."""
    assert displacement(accelerator, [1.0, -1.0], adam_beta1=0.0) == pytest.approx(0.0, abs=1e-3)
    assert displacement(accelerator, [1.0, -1.0], adam_beta1=0.9) == pytest.approx(-1 + 0.0526, abs=1e-3)


def test_the_second_moment_is_averaged_with_adam_beta2(accelerator):
    """Gradients 1 and 3: 3 / 3 without memory, 3 / sqrt(4.75 / 0.75) with 0.5."""
    settings = {"adam_beta1": 0.0}
    assert displacement(accelerator, [1.0, 3.0], adam_beta2=0.0, **settings) == pytest.approx(-2.0, abs=1e-3)
    assert displacement(accelerator, [1.0, 3.0], adam_beta2=0.5, **settings) == pytest.approx(-2.1921, abs=1e-3)


def test_weight_decay_takes_its_share_of_a_matrix_and_spares_a_vector(accelerator):
    """Adam's first step is one learning rate; half of a learning rate of a weight of 2 is another one."""
    learner, weights = make_learner(weight_decay=0.5)
    set_gradient(weights, [1.0, 1.0], b=1.0)
    learner.optimizer_step(1, accelerator)
    assert weights.b.flatten().tolist() == pytest.approx([2 - PEAK - 0.5 * PEAK * 2] * 2, abs=1e-7)
    assert weights.a.tolist() == pytest.approx([1 - PEAK] * 2, abs=1e-7)
    assert weights.unused.item() == pytest.approx(5 - 0.5 * PEAK * 5, abs=1e-7)  # its gradient is 0, and it decays


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**SMALL)),  # biases, tied or not
        (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SMALL, head_dim=8)),  # norms of queries and keys
        (transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**SMALL, head_dim=8)),
        (transformers.MixtralForCausalLM, transformers.MixtralConfig(**SMALL)),  # weights of three dimensions
        (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)),
        (transformers.BloomForCausalLM, transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_decays_is_what_decays_in_the_trainer_of_transformers(model_class, config):
    model = model_class(config)
    learner = Learner("policy", model, RLConfig(weight_decay=0.1))
    decaying = {id(p) for group in learner.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    named = {name for name, parameter in model.named_parameters() if id(parameter) in decaying}
    in_transformers = transformers.Trainer.get_decay_parameter_names(None, model)
    assert named == dict(model.named_parameters()).keys() & set(in_transformers)
    assert 0 < len(named) < len(learner.parameters)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_state_of_an_optimizer_with_one_group_goes_on_as_it_began(accelerator, weight_decay):
    """As checkpoints of earlier versions have it: everything decays, in the resumed run too."""
    weights, resumed = Weights(), Weights()
    older = torch.optim.AdamW([weights.a, weights.b, weights.unused], lr=PEAK, weight_decay=weight_decay)
    learner = Learner("policy", resumed, RLConfig(learning_rate=PEAK, weight_decay=weight_decay, max_grad_norm=0.0))
    for step in (1, 2):
        set_gradient(weights, [1.0, -2.0 / step], b=0.5)
        weights.unused.grad = torch.zeros(1, 1)
        older.step()
        if step == 1:
            resumed.load_state_dict(weights.state_dict())
            learner.load_optimizer(deepcopy(older.state_dict()))
    set_gradient(resumed, [1.0, -1.0], b=0.5)
    learner.optimizer_step(2, accelerator)
    assert all(torch.equal(a, b) for a, b in zip(weights.parameters(), resumed.parameters(), strict=True))


def test_two_groups_are_loaded_as_they_were_saved(accelerator):
    (first, before), (second, after) = make_learner(weight_decay=0.5), make_learner(weight_decay=0.5)
    set_gradient(before, [1.0, -2.0], b=0.5)
    first.optimizer_step(1, accelerator)
    after.load_state_dict(before.state_dict())
    second.load_optimizer(deepcopy(first.optimizer.state_dict()))
    for learner, weights in ((first, before), (second, after)):
        set_gradient(weights, [0.5, 1.0], b=-1.0)
        learner.optimizer_step(2, accelerator)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.5, 0.0]


def test_without_weight_decay_or_without_vectors_there_is_one_group():
    assert len(make_learner()[0].optimizer.param_groups) == 1
    assert len(Learner("policy", nn.Linear(2, 2, bias=False), RLConfig(weight_decay=0.1)).optimizer.param_groups) == 1


def test_a_learner_may_have_a_learning_rate_of_its_own_even_zero():
    for peak in (PEAK, 0.5, 0.0):
        assert Learner("value", Weights(), RLConfig(learning_rate=peak)).rate(1) == peak


# The schedule


def rate(step: int, **settings: object) -> float:
    """The learning rate of a step, over the highest one."""
    return rates(**settings)[step - 1]


def rates(**settings: object) -> list[float]:
    """The learning rates of all steps of a run, over the highest one."""
    learner, _ = make_learner(**settings)
    return [learner.rate(step) / PEAK for step in range(1, learner.config.num_steps + 1)]


def test_the_rate_rises_in_equal_steps_and_the_first_step_is_not_lost():
    assert [rate(step, warmup_steps=4) for step in (1, 2, 3, 4, 5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rate(1, warmup_steps=0) == 1.0
    assert rate(1, warmup_steps=1) == 1.0


def test_a_constant_rate_stays():
    assert rate(12) == rate(1) == 1.0


@pytest.mark.parametrize(("scheduler", "quarter", "half"), [("linear", 0.775, 0.55), ("cosine", 0.868198, 0.55)])
def test_a_falling_rate_starts_at_the_top_and_ends_at_its_floor_in_the_last_step(scheduler, quarter, half):
    """Twelve steps, four of them warm-up: a quarter of the way down after step 6, half of it after step 8."""
    options = {"lr_scheduler": scheduler, "warmup_steps": 4, "min_lr_ratio": 0.1}
    assert [rate(step, **options) for step in (4, 6, 8, 12)] == pytest.approx([1.0, quarter, half, 0.1], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 30), st.integers(1, 30), st.floats(0, 1))
def test_the_rate_rises_then_falls_between_floor_and_peak(scheduler, warmup_steps, num_steps, floor):
    options = {"lr_scheduler": scheduler, "warmup_steps": warmup_steps, "num_steps": num_steps, "min_lr_ratio": floor}
    run = rates(**options)
    top = min(warmup_steps, num_steps)
    assert run[:top] == sorted(run[:top]) and run[top:] == sorted(run[top:], reverse=True)
    assert min(run) >= 0 and max(run) <= 1 + 1e-9
    if warmup_steps < num_steps:
        assert run[-1] == pytest.approx(1.0 if scheduler == "constant" else floor)


# A pass over rollouts


def test_an_update_takes_its_rate_and_its_mini_batches_from_the_call_and_changes_no_setting(accelerator, rollouts):
    learner, weights = make_learner(num_minibatches=1, weight_decay=0.0, max_tokens_per_microbatch=16384)
    before = vars(learner.config).copy()
    batches = Batches(learner.config, accelerator, torch.float32)

    def loss(minibatch):
        return weights.a.sum() * torch.ones(minibatch.completion_mask.shape), {"first/seen": minibatch.advantages}

    rollouts.advantages = torch.ones(rollouts.completion_mask.shape)
    parts = learner.update(rollouts, loss, batches=batches, step=7, rate=0.25, num_minibatches=3)
    assert [name for name, _, _ in parts].count("policy/grad_norm") == 3
    assert [name for name, _, _ in parts].count("seen") == 1  # of the first mini-batch alone
    assert learner.optimizer.param_groups[0]["lr"] == 0.25 and vars(learner.config) == before
    torch.testing.assert_close(weights.a.detach(), torch.tensor([1.0, 1.0]) - 3 * 0.25)  # Adam: a rate per step
    parts = learner.update(rollouts, loss, batches=batches, step=7, epoch=1)
    assert learner.optimizer.param_groups[0]["lr"] == learner.rate(7) and "seen" not in [name for name, _, _ in parts]
