"""The same batch through trl and through ours: advantages, loss, gradient and metrics are the same.

Both get the same completions and scores, and go through their own code for all that comes after. Two optimizer steps
are compared, the second one after the policy has moved, so that ratios are off 1 and the clip acts. The reference is
the model that both start from; the policy that samples has already left it.
"""

from dataclasses import dataclass

import pytest
import torch

from CISPO.cispo_trainer import CISPOConfig, CISPOTrainer
from common.rollouts import Completion
from common.tasks import Task
from common.trainer import OnPolicyTrainer
from DAPO.dapo_trainer import DAPOConfig, DAPOTrainer
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from GSPO.gspo_trainer import GSPOConfig, GSPOTrainer
from RLOO.rloo_trainer import RLOOConfig, RLOOTrainer
from tests.enumeration import FixedSampler, put_weights, record_gradients

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
get_soft_overlong_punishment = pytest.importorskip("trl.rewards").get_soft_overlong_punishment

PROMPTS = ["1 2", "3 4 5 6 make 7\n", "8\n"]
GROUP_SIZE, MAX_LENGTH = 4, 6
LENGTHS = [3, 6, 1, 6, 2, 4, 6, 5, 6, 1, 1, 4]  # those of MAX_LENGTH were cut off, the others have an end
SCORES = [0.5, -1.0, 2.25, 0.75, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, -0.5]  # the second group has nothing to teach
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
OUR_CLIP = {"clip_range": 0.2, "clip_range_high": 0.28}


@dataclass
class Step:
    """Gradient of both optimizer steps, and what was reported."""

    gradients: list[torch.Tensor]
    metrics: dict[str, float]
    advantages: list[float]


def fixed_scores(prompts, completions, **columns):
    return SCORES


def fixed_completions(end_token_id):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 250, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = [ids if len(ids) == MAX_LENGTH else [*ids[:-1], end_token_id] for ids in rows]
    return [Completion(ids, [0.0] * len(ids), truncated=len(ids) == MAX_LENGTH) for ids in rows]


def two_policies(parameters):
    """Weights of the policy that samples, and of the one after the first optimizer step."""
    generator = torch.Generator().manual_seed(0)
    sampling = [p.detach() + 0.05 * torch.randn(p.shape, generator=generator) for p in parameters]
    return sampling, [w + 0.02 * torch.randn(w.shape, generator=generator) for w in sampling]


def our_trainer(kind, config_type, model, folder, **settings):
    fixed = {
        "sampler": "transformers",
        "prompts_per_step": len(PROMPTS),
        "num_generations": GROUP_SIZE,
        "num_update_epochs": 2,
        "max_prompt_length": 32,
        "max_completion_length": MAX_LENGTH,
        "eval_every": 0,
        "samples_every": 0,
        "progress": False,
        "max_logprob_diff": 0,  # the completions are written, not sampled
    }
    config = config_type(model=str(model), output_dir=str(folder / "ours"), **fixed, **settings)
    rows, weights = [{"prompt": prompt} for prompt in PROMPTS], {"fixed": 1.0}
    task = Task(train=rows, eval=[], rewards={"fixed": fixed_scores}, reward_weights=weights, accuracy=None)
    return kind(config, task=task)


def our_step(trainer: OnPolicyTrainer) -> Step:
    """A real step of two epochs."""
    sampling, later = two_policies(trainer.policy.parameters)
    put_weights(trainer.policy.parameters, sampling)
    trainer.policy_sampler.sampler = FixedSampler(fixed_completions(trainer.tokenizer.eos_token_id))
    gradients = record_gradients(trainer.policy, move_to=later)
    loss, advantages = trainer.loss, {}

    def recorded_loss(policy, minibatch):
        advantages.update(zip(minibatch.rows.tolist(), minibatch.advantages[:, 0].tolist(), strict=True))
        return loss(policy, minibatch)

    trainer.loss = recorded_loss
    trainer.current_step = 1
    trainer.step(trainer.training_prompts(1))
    metrics = trainer.metrics.reduce(trainer.accelerator)
    return Step(gradients, metrics, [advantages[row] for row in range(len(SCORES))])


def their_step(kind, config_type, model, folder, prompts, *, rewards=fixed_scores, **settings) -> Step:
    fixed = {
        "per_device_train_batch_size": len(SCORES),
        "gradient_accumulation_steps": 1,
        "num_generations": GROUP_SIZE,
        "num_iterations": 2,
        "max_completion_length": MAX_LENGTH,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    config = config_type(output_dir=str(folder / "theirs"), **fixed, **settings)
    data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = kind(str(model), rewards, args=config, train_dataset=data)
    trainer.current_gradient_accumulation_steps = 1  # which its training loop sets
    completions = [c.token_ids for c in fixed_completions(trainer.processing_class.eos_token_id)]
    generated = (completions, None) if kind is trl.GRPOTrainer else completions
    trainer._generate_single_turn = lambda *request: generated
    parameters = list(trainer.model.train().parameters())
    policies = two_policies(parameters)
    put_weights(parameters, policies[0])
    inputs = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(GROUP_SIZE)])
    gradients, losses = [], []
    for weights in policies:
        put_weights(parameters, weights)
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten().double() for parameter in parameters]))
        losses.append(loss.item())
    metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    return Step(gradients, metrics | {"loss": sum(losses) / 2}, inputs["advantages"].tolist())


def assert_same(ours: Step, theirs: Step, names: dict[str, str]) -> None:
    """Advantages, gradients, loss, and the metrics whose names are given, ours first."""
    assert ours.advantages == pytest.approx(theirs.advantages, abs=1e-5)
    for our_gradient, their_gradient in zip(ours.gradients, theirs.gradients, strict=True):
        assert (our_gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()
        assert their_gradient.norm() > 0.01
    assert (ours.gradients[0] - ours.gradients[1]).norm() > 0.1 * ours.gradients[0].norm()
    for our_name, their_name in ({"policy/loss": "loss", "entropy": "entropy"} | names).items():
        assert ours.metrics[our_name] == pytest.approx(theirs.metrics[their_name], rel=1e-4, abs=1e-5), our_name
    assert ours.metrics["policy/clip_fraction"] > 0.02


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("loss_type", "average_over", "scaled"),
    [
        ("grpo", "rows", True),
        ("grpo", "rows", False),
        ("bnpo", "tokens", True),
        ("dapo", "tokens", True),
        ("dr_grpo", "constant", False),
    ],
)
def test_grpo_takes_the_steps_of_trl(tiny_folder, tmp_path, loss_type, average_over, scaled, beta):
    settings = {"average_over": average_over, "scale_by_std": scaled, "kl_coef": beta, "temperature": 0.8} | OUR_CLIP
    trainer = our_trainer(GRPOTrainer, GRPOConfig, tiny_folder, tmp_path, **settings)
    theirs = their_step(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        tiny_folder,
        tmp_path,
        trainer.training_prompts(1).prompts,
        loss_type=loss_type,
        scale_rewards="group" if scaled else "none",
        beta=beta,
        use_bias_correction_kl=False,  # the ratio in front of the KL is not in GRPO's paper
        temperature=0.8,
        **CLIP,
    )
    names = {"policy/clip_fraction": "clip_ratio/region_mean"} | ({"policy/kl_loss": "kl"} if beta else {})
    assert_same(our_step(trainer), theirs, names)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rloo_takes_the_steps_of_trl(tiny_folder, tmp_path, beta):
    """The ratio is of completions, and their KL is in their rewards."""
    trainer = our_trainer(RLOOTrainer, RLOOConfig, tiny_folder, tmp_path, kl_coef=beta, temperature=0.8, **OUR_CLIP)
    theirs = their_step(
        trl.RLOOTrainer,
        trl.RLOOConfig,
        tiny_folder,
        tmp_path,
        trainer.training_prompts(1).prompts,
        beta=beta,
        temperature=0.8,
        **CLIP,
    )
    assert_same(our_step(trainer), theirs, {"kl": "kl"} if beta else {})


@pytest.mark.parametrize(
    ("trainer", "config", "ours", "theirs", "names"),
    [
        (
            GSPOTrainer,
            GSPOConfig,
            {"clip_range": 0.02, "clip_range_high": 0.03},
            {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.02, "epsilon_high": 0.03},
            {"policy/clip_fraction": "clip_ratio/region_mean"},
        ),
        # Its upper end is the largest weight itself, and it counts only those of good tokens that are cut.
        (CISPOTrainer, CISPOConfig, {"clip_range_high": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}, {}),
        (
            DAPOTrainer,
            DAPOConfig,
            {"overlong_buffer": 4} | OUR_CLIP,
            {"loss_type": "dapo", "rewards": [fixed_scores, get_soft_overlong_punishment(MAX_LENGTH, 4)]} | CLIP,
            {"policy/clip_fraction": "clip_ratio/region_mean"},
        ),
    ],
    ids=["gspo", "cispo", "dapo"],
)
def test_each_loss_of_trls_grpo_that_is_an_algorithm_here_takes_its_steps(
    tiny_folder, tmp_path, trainer, config, ours, theirs, names
):
    trainer = our_trainer(trainer, config, tiny_folder, tmp_path, temperature=0.8, **ours)
    prompts = trainer.training_prompts(1).prompts
    settings = {"beta": 0.0, "temperature": 0.8, "scale_rewards": "group"} | theirs
    theirs = their_step(trl.GRPOTrainer, trl.GRPOConfig, tiny_folder, tmp_path, prompts, **settings)
    assert_same(our_step(trainer), theirs, names)
