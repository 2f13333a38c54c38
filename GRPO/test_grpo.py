"""GRPO as a whole: each of its settings acts. That it learns is in tests/test_algorithms.py."""

import warnings

import pytest
import torch

from common.advantages import group_relative
from common.rewards.scorer import Scorer
from GRPO.grpo_trainer import GRPOConfig
from tests.toy import CLIP, SEVERAL, metrics_of, toy_trainer, trained_weights, updates_of

WITH_KL = SEVERAL | {"kl_coef": 1.0}
# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {
    "average_over": ({}, "tokens"),
    "scale_by_std": ({}, False),
    "whiten_rewards": ({"scale_by_std": False}, True),
    "kl_estimator": (WITH_KL, "k2"),
    "kl_place": (WITH_KL, "reward"),
    "sparse": None,  # changes no weight; that it spares passes is shown below
    "keep_per_group": (SEVERAL, True),
    "refill_rounds": None,  # tests/test_refill.py
}
VALUES = {"refill_rounds": [0, 1, 3], "kl_estimator": [None, "k1", "k2", "k3"]}


def test_the_kl_before_the_first_update_is_exactly_zero(tiny_folder, tmp_path):
    for name, settings in {"full": {}, "lora": {"use_lora": True, "lora_r": 4}}.items():
        toy_trainer(tiny_folder, tmp_path / name, kl_coef=0.1, num_steps=3, **settings).train()
        for metric in ("kl", "policy/kl_loss"):
            kl = [line[metric] for line in metrics_of(tmp_path / name)]
            assert kl[0] == 0.0 and kl[1] != 0 and kl[2] != 0


def test_no_reference_is_loaded_when_no_kl_is_wanted(tiny_folder, tmp_path):
    trainer = toy_trainer(tiny_folder, tmp_path / "run")
    assert "ref" not in trainer.models
    trainer.train()
    assert "kl" not in metrics_of(tmp_path / "run")[0]


@pytest.mark.slow
def test_with_lora_the_reference_stays_the_base_model(tiny_folder, tmp_path, rollouts):
    trainer = toy_trainer(tiny_folder, tmp_path / "run", kl_coef=0.1, use_lora=True, lora_r=4, num_steps=10)
    before = trainer.logprobs("ref", rollouts)
    assert torch.equal(trainer.logprobs("policy", rollouts), before)
    trainer.train()
    assert torch.equal(trainer.logprobs("ref", rollouts), before)
    assert not torch.equal(trainer.logprobs("policy", rollouts), before)


def test_several_minibatches_and_epochs_start_at_ratio_one_and_then_clip(tiny_folder, tmp_path):
    settings = {"num_minibatches": 2, "num_update_epochs": 4, "learning_rate": 1e-2, "clip_range": 0.05}
    toy_trainer(tiny_folder, tmp_path / "run", **settings).train()
    for line in metrics_of(tmp_path / "run"):
        assert line["policy/first_ratio"] == 1.0
        assert line["policy/ratio"] != 1.0
        assert line["policy/clip_fraction"] > 0


def test_sparse_ends_at_the_same_weights_without_the_rows_that_teach_nothing(tiny_folder, tmp_path):
    trainers = {sparse: toy_trainer(tiny_folder, tmp_path / str(sparse), sparse=sparse) for sparse in (True, False)}
    passes = {True: 0, False: 0}
    for sparse, trainer in trainers.items():
        # With the sum alone as reward most groups of an untrained policy score 0 all over; two of four are made to.
        trainer.scorer = Scorer({"digits": lambda prompts, completions, total, **columns: [
            0.5 if t % 2 else len(text) for t, text in zip(total, completions, strict=True)
        ]}, {"digits": 1.0})  # fmt: skip
        whole = trainer.loss

        def counted(policy, minibatch, whole=whole, sparse=sparse):
            passes[sparse] += len(minibatch)
            return whole(policy, minibatch)

        trainer.loss = counted
    torch.testing.assert_close(trained_weights(trainers[True]), trained_weights(trainers[False]), atol=1e-5, rtol=1e-4)
    assert 0 < passes[True] < passes[False] == 32


def test_a_step_in_which_all_groups_are_equal_changes_no_weight(tiny_folder, tmp_path):
    for sparse in (True, False):
        trainer = toy_trainer(tiny_folder, tmp_path / str(sparse), sparse=sparse, weight_decay=0.1, num_steps=3)
        scores = iter([None, 0.5, 0.5])
        task_reward = trainer.scorer.functions["digits"]

        def reward(prompts, completions, scores=scores, task_reward=task_reward, **columns):
            constant = next(scores)
            return task_reward(prompts, completions) if constant is None else [constant] * len(completions)

        trainer.scorer = Scorer({"digits": reward}, {"digits": 1.0})
        snapshots = []
        step = trainer.step

        def recorded(prompts, step=step, trainer=trainer, snapshots=snapshots):
            step(prompts)
            snapshots.append([p.detach().clone() for p in trainer.policy.parameters])

        trainer.step = recorded
        trainer.train()
        for later in snapshots[1:]:
            assert all(torch.equal(a, b) for a, b in zip(snapshots[0], later, strict=True))
        assert metrics_of(tmp_path / str(sparse))[1]["zero_advantage"] == 1.0


def test_keep_per_group_trains_on_one_row_of_each_group(tiny_folder, tmp_path):
    trainer = toy_trainer(tiny_folder, tmp_path / "run", keep_per_group=True, num_steps=1)
    seen = []
    whole = trainer.loss
    trainer.loss = lambda policy, minibatch: seen.append(minibatch) or whole(policy, minibatch)
    trainer.train()
    rows = torch.cat([minibatch.rows for minibatch in seen])
    assert sorted(rows.tolist()) == [0, 1, 2, 3]  # numbered by group
    weights = torch.cat([minibatch.token_weights.sum(1) for minibatch in seen])
    torch.testing.assert_close(weights, torch.full((4,), 0.25))  # "rows": the four that are left are all there are


def test_kl_in_the_reward_is_taken_from_the_score_before_groups_are_compared(tiny_folder, tmp_path):
    settings = {"kl_place": "reward", "num_steps": 4, "learning_rate": 1e-2}
    trainer = toy_trainer(tiny_folder, tmp_path / "run", kl_coef=0.5, **settings)
    seen = updates_of(trainer)
    trainer.train()
    kl = [line["kl"] for line in metrics_of(tmp_path / "run")]
    assert kl[0] == 0.0 and kl[-1] != 0.0
    _, rollouts = seen[-1]
    log_ratio = (rollouts.old_logprobs - rollouts.ref_logprobs).sum(1)  # k1
    expected = rollouts.spread(group_relative(rollouts.scores - 0.5 * log_ratio, 4))
    torch.testing.assert_close(rollouts.advantages, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, rollouts.spread(group_relative(rollouts.scores, 4)), atol=1e-2)


@pytest.mark.slow
def test_the_estimator_left_to_the_place_is_k3_in_the_loss_and_k1_in_the_reward(tiny_folder, tmp_path):
    settings = {"kl_coef": 1.0, "learning_rate": 1e-2, "num_steps": 3}
    for place, estimator in (("loss", "k3"), ("reward", "k1")):
        weights = [
            trained_weights(
                toy_trainer(tiny_folder, tmp_path / f"{place}{name}", kl_place=place, kl_estimator=name, **settings)
            )
            for name in (None, estimator)
        ]
        assert torch.equal(*weights)


@pytest.mark.parametrize("steps", [{}, SEVERAL], ids=["one step", "several"])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_kl_is_that_of_the_policy_that_sampled_wherever_the_kl_is(tiny_folder, tmp_path, steps, place):
    """The mean over all real tokens of log(policy / reference), before any update of the step."""
    settings = steps | {"kl_coef": 0.1, "kl_place": place, "num_steps": 1, "mask_truncated": True}
    trainer = toy_trainer(tiny_folder, tmp_path / "run", **settings)
    move_reference(trainer)
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    log_ratios = trainer.logprobs("policy", rollouts) - trainer.logprobs("ref", rollouts)
    line = trainer.train()
    mean = float(log_ratios[rollouts.completion_mask].double().mean())
    assert line["kl"] == pytest.approx(mean, rel=1e-4) and abs(mean) > 1e-3
    assert ("policy/kl_loss" in line) is (place == "loss")


def move_reference(trainer) -> None:
    """Give the reference other weights than the policy."""
    with torch.no_grad(), trainer.models.use("ref") as ref:
        for index, parameter in enumerate(ref.parameters()):
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel()) + index).view_as(parameter))


def test_sparse_keeps_groups_of_equal_scores_whose_kl_in_the_reward_differs(tiny_folder, tmp_path):
    """Rows are dropped by what their advantages are made of, which is the score less the KL."""
    kept, weights = {}, {}
    for sparse in (True, False):
        settings = {"kl_coef": 0.5, "kl_place": "reward", "sparse": sparse, "num_steps": 1}
        trainer = toy_trainer(tiny_folder, tmp_path / str(sparse), **settings)
        move_reference(trainer)
        trainer.scorer = Scorer({"digits": lambda completions, **_: [0.5] * len(completions)}, {"digits": 1.0})
        seen = updates_of(trainer)
        weights[sparse] = trained_weights(trainer)
        ((_, kept[sparse]),) = seen
    assert len(kept[True]) == len(kept[False]) == 16 and kept[True].advantages.any()
    assert torch.equal(weights[True], weights[False])


@pytest.fixture(scope="module")
def weights_with(tiny_folder, tmp_path_factory):
    """The weights after training with these settings; the same ones are trained once."""
    known = {}

    def weights(settings: dict) -> torch.Tensor:
        if str(settings) not in known:
            folder = tmp_path_factory.mktemp("run") / "run"
            known[str(settings)] = trained_weights(toy_trainer(tiny_folder, folder, **settings))
        return known[str(settings)]

    return weights


@pytest.mark.parametrize(
    "settings",
    [
        {"average_over": "constant"},
        {"whiten_advantages": True},
        {"max_grad_norm": 1e-9},
        {"weight_decay": 0.5},
        {"warmup_steps": 2},
        {"adam_beta1": 0.0, "adam_beta2": 0.5},
        {"lr_scheduler": "linear"},
        {"reward_weights": [0.0, 1.0], "rewards": ["digits", "sum"]},
        {"rewards": ["sum"]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_that_every_algorithm_has_act_too(weights_with, settings):
    assert not torch.equal(weights_with({}), weights_with(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 1.0, "kl_estimator": "k2"},
        {"num_minibatches": 1},
        {"num_update_epochs": 1},
    ],
    ids=str,
)
def test_settings_of_several_optimizer_steps_act(weights_with, settings):
    base = SEVERAL | ({"kl_coef": 1.0} if "kl_coef" in settings else {})
    assert not torch.equal(weights_with(base), weights_with(base | settings))


def test_truncated_completions_can_be_left_out_of_gradient_and_mean(tiny_folder, tmp_path):
    # An untrained policy hardly ever ends: nearly every completion is cut off, so nearly nothing is left.
    trainer = toy_trainer(tiny_folder, tmp_path / "run", mask_truncated=True, num_steps=1, average_over="tokens")
    weights = []
    whole = trainer.loss
    trainer.loss = lambda policy, minibatch: weights.append(minibatch) or whole(policy, minibatch)
    trainer.train()
    for minibatch in weights:
        assert minibatch.token_weights[minibatch.truncated].eq(0).all()
    total = sum(float(minibatch.token_weights.sum()) for minibatch in weights)
    assert total == pytest.approx(1.0) or all(bool(minibatch.truncated.all()) for minibatch in weights)
    assert all(line["policy/loss"] == line["policy/loss"] for line in metrics_of(tmp_path / "run"))  # no NaN


@pytest.mark.parametrize("average_over", ["tokens", "rows"])
def test_completions_that_are_left_out_do_not_make_the_others_weigh_less(toy_folder, tmp_path, average_over):
    trainer = toy_trainer(toy_folder, tmp_path / "run", mask_truncated=True, num_steps=1, average_over=average_over)
    seen, whole = [], trainer.loss
    trainer.loss = lambda policy, minibatch: seen.append(minibatch) or whole(policy, minibatch)
    trainer.train()
    truncated = torch.cat([minibatch.truncated for minibatch in seen])
    assert truncated.any() and not truncated.all()
    assert sum(float(minibatch.token_weights.sum()) for minibatch in seen) == pytest.approx(1)


def test_sparse_with_a_kl_in_the_loss_warns_that_it_is_not_exact():
    with pytest.warns(UserWarning, match="KL"):
        GRPOConfig(sparse=True, kl_coef=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRPOConfig(sparse=True, kl_coef=0.0)
        GRPOConfig(sparse=True, kl_coef=0.1, kl_place="reward")


def test_correct_use_warns_of_nothing(tiny_folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_trainer(tiny_folder, tmp_path / "run", kl_coef=0.1, eval_every=1, save_every=1, use_lora=True).train()


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_in_bfloat16_too_the_ratio_starts_at_one_and_the_kl_at_zero(tiny_folder, tmp_path, use_lora):
    settings = {"dtype": "bfloat16", "kl_coef": 0.1, "num_minibatches": 2, "num_update_epochs": 2, "lora_r": 4}
    trainer = toy_trainer(tiny_folder, tmp_path / "run", use_lora=use_lora, **settings)
    trainer.train()
    first, second = metrics_of(tmp_path / "run")
    assert first["policy/first_ratio"] == second["policy/first_ratio"] == 1.0
    assert first["kl"] == 0 < second["policy/kl_loss"]
    assert first["sampler/logprob_diff"] < 0.05  # the sampler goes token by token, the trainer does not


def test_with_one_optimizer_step_the_first_kl_is_zero_in_bfloat16_too(tiny_folder, tmp_path):
    toy_trainer(tiny_folder, tmp_path / "run", dtype="bfloat16", kl_coef=0.1, num_steps=1).train()
    assert metrics_of(tmp_path / "run")[0]["kl"] == 0.0
