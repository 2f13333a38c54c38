"""Steps of toy runs with shard=full, for each of several cases; test_sharding.py starts it.

Arguments: model folder, folder for results, and cases: an algorithm, and names of VARIANTS after commas. One process
keeps its models whole, so it gives what several must give. FACTS are things that only several processes can show.
"""

import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common
import common.trainer
from common.config import RLConfig
from common.logprobs import sequence_logprobs, token_logprobs, without_adapter
from common.mistakes import WrongNumbers
from common.models.loading import load_policy
from common.models.pool import ModelPool
from common.models.weights import not_finite
from common.packing import packing_of
from common.rollouts import Rollouts
from common.sampling.torch_sampler import TransformersSampler
from common.sequences import Sequences
from common.sharding import as_forward, blocks, is_part, shard, whole
from common.trainer import OnPolicyTrainer
from common.update.learner import Learner
from common.update.optimizers import HostAdamW
from Distill.test_distill import adapter_on
from PPO.test_ppo import FITTED
from tests.toy import LORA, learners_of, toy_config, toy_trainer, updates_of

# The toy policy's gradients are small: a change of its weights is to be far above their rounding. Adapters begin at 0.
RATE = 300.0
STEP = {"dtype": "float32", "kl_coef": 0.1, "num_minibatches": 2, "max_grad_norm": 0.5, "num_steps": 1}
SEVERAL = STEP | {"num_steps": 6, "learning_rate": 1e-4, "num_minibatches": 1, "num_update_epochs": 2}


def teaching_adapter(policy: Path) -> str:
    """An adapter of the policy's base, which the run in one process has made before that in two begins."""
    folder = policy.with_name(f"{policy.name} teaching adapter")
    return str(folder) if folder.is_dir() else adapter_on(policy, folder, 10.0)


# Settings beside STEP. Without a name that ends in "steps", a step goes down the gradient, to show it.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    # Only the first process has rows. Norms are summed in another order, so clipping would round.
    "alone": {"max_grad_norm": 0.0, "kl_coef": 0.0, "sparse": True},
    "steps": SEVERAL,
    "host_steps": SEVERAL | {"optimizer": "adamw_host", "num_steps": 3},
    "offload_steps": SEVERAL | {"offload": "always"},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "adapter": {"teacher": teaching_adapter},
    "fitted": FITTED | {"value_init_learning_rate": 1e-3, "offload": "always"},
}


class CopySampler(TransformersSampler):
    """A sampler with weights of its own, as an engine has them: a whole copy of the policy that gets each push."""

    needs_push = True
    has_weights = False

    def __init__(self, config: RLConfig, path: str, device: torch.device) -> None:
        self._copy = load_policy(path, RLConfig(model=path, sampler=config.sampler), dtype=torch.float32).to(device)
        pool = ModelPool(device, "never")
        pool.add("policy", self._copy)
        super().__init__(lambda: pool.use("policy"), device=device)

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights of the copy."""
        found = {name: tensor.float() for name, tensor in weights}
        missing = self._copy.load_state_dict(found, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}  # tied
        self.has_weights = True


def sample_from_copies() -> None:
    """Have trainers sample without engines, which have tests of their own."""
    common.trainer.make_sampler = lambda config, path, *, pool, **_: CopySampler(config, path, pool.device)
    common.trainer.check_sampler = common.trainer.check_sampling = lambda *_: None


def main() -> None:
    """Take the steps of every case, and find the facts."""
    model, folder, *cases = sys.argv[1:]
    warnings.filterwarnings("error", message="FSDP2")
    sample_from_copies()
    for case in cases:
        trainer = take_steps(Path(model), Path(folder), case)
    if trainer.accelerator.num_processes > 1:
        for fact in FACTS:
            found = fact(Path(model), Path(folder))
            torch.save(found, Path(folder) / f"{fact.__name__}-{trainer.accelerator.process_index}.pt")
        # Threads of a process group that are still there when Python ends can abort the process.
        trainer.accelerator.state.destroy_process_group()


def make_trainer(model: Path, folder: Path, algorithm: str, *variants: str, **settings: object) -> OnPolicyTrainer:
    """A trainer of the toy task whose models are spread over all processes."""
    settings = STEP | {"shard": "full", "sampler": "vllm"} | settings
    for name in variants:
        settings |= VARIANTS[name]
    return toy_trainer(model, folder / "-".join([algorithm, *variants]), algorithm=algorithm, **settings)


def take_steps(model: Path, folder: Path, case: str) -> OnPolicyTrainer:
    """Take the steps of a case, and save their metrics, the change of all trained weights and who had rows."""
    algorithm, *variants = case.split(",")
    trainer = make_trainer(model, folder, algorithm, *variants)
    if not any(name.endswith("steps") for name in variants):
        for learner in learners_of(trainer):
            learner.optimizer = torch.optim.SGD(learner.parameters, lr=1.0)
            is_small = trainer.config.use_lora or trainer.config.dtype == "bfloat16"
            learner.rate = lambda _, rate=(1.0 if is_small else RATE): rate
    if "alone" in variants:
        score = trainer.score
        trainer.score = lambda rollouts: torch.where(rollouts.rows >= 8, 0.5, score(rollouts))
    before = weights_of(trainer)
    seen, lines = updates_of(trainer), []
    for step in range(1, trainer.config.num_steps + 1):
        trainer.current_step = step
        trainer.step(trainer.training_prompts(step))
        lines.append(trainer.metrics.reduce(trainer.accelerator))
    rows = trainer.batches.of_each_process([len(rollouts) for _, rollouts in seen[:1]])
    after = weights_of(trainer)
    if trainer.accelerator.is_main_process:
        content = {"change": [a - b for a, b in zip(after, before, strict=True)], "metrics": lines, "rows": rows}
        torch.save(content, folder / f"{case}.pt")
    return trainer


def weights_of(trainer: OnPolicyTrainer) -> list[Tensor]:
    """All weights that are trained, whole, by all processes together."""
    for learner in learners_of(trainer):
        with trainer.models.use(learner.name):
            pass
    return [whole(p.detach()).clone() for learner in learners_of(trainer) for p in learner.parameters]


# ------------------------------------------------------------------------------------- what several processes show


def rows_of(process: int | None) -> Rollouts:
    """Rows of a process, or all, with weights for their log-probs."""
    from common.packing import _compared_rows

    rows = _compared_rows(200)
    rows.token_weights = torch.linspace(-1, 1, rows.completion_mask.numel()).view_as(rows.completion_mask)
    return rows if process is None else rows[torch.tensor([0, 1] if process == 0 else [2, 3])]


def loss_of(model: nn.Module, rows: Rollouts) -> Tensor:
    """The sum of weighted log-probs of rows."""
    rows = rows.to(device())
    logprobs, _ = token_logprobs(model, rows, 1.0, with_entropy=False)
    return torch.where(rows.loss_mask, logprobs * rows.token_weights, 0.0).sum()


def sharded(model: Path, folder: Path, **settings: object) -> tuple[nn.Module, Learner]:
    """A sharded toy policy, and its learner with plain gradient descent."""
    config = toy_config(model, folder / "none", **settings)
    policy = load_policy(str(model), config, dtype=torch.float32)
    shard(without_adapter(policy).to(device()), device())
    learner = Learner("policy", policy, config)
    learner.optimizer = torch.optim.SGD(learner.parameters, lr=0.1)
    return policy, learner


def device() -> torch.device:
    """This process's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def process() -> int:
    """This process's number."""
    return torch.distributed.get_rank()


def a_pass_without_gradient_between_backward_and_step(model: Path, folder: Path) -> dict:
    """The log-probs after a step, with a pass in between and without."""
    found = []
    for between in (False, True):
        policy, learner = sharded(model, folder)
        loss_of(policy, rows_of(process())).backward()
        if between:
            with torch.no_grad():
                loss_of(policy, rows_of(process()))
        learner.optimizer.step()
        with torch.no_grad():
            found.append(float(loss_of(policy, rows_of(None))))
    return {"without": found[0], "with": found[1]}


def names_while_whole(model: Path, folder: Path) -> dict:
    """Which of the model's parameters, and of the learner's, are parts in the middle of a pass."""
    policy, learner = sharded(model, folder)

    def parts() -> tuple[int, int, int]:
        named, own = dict(policy.named_parameters()), learner.parameters
        return sum(map(is_part, named.values())), sum(map(is_part, own)), len(own)

    return {"before": parts(), "within": as_forward(policy, parts), "after": parts()}


def an_error_in_a_pass(model: Path, folder: Path) -> dict:
    """What is whole after a pass that ended in an error, and the gradient of the next one."""
    policy, learner = sharded(model, folder)
    loss_of(policy, rows_of(process())).backward()
    expected = [whole(p.grad).clone() for p in learner.parameters]
    learner.drop_gradient()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = policy.base_model.layers[1].mlp.register_forward_pre_hook(fail)
    try:
        loss_of(policy, rows_of(process()))
    except ZeroDivisionError:
        left = sum(not is_part(p) for p in policy.parameters())
    hook.remove()
    loss_of(policy, rows_of(process())).backward()
    found = [whole(p.grad) for p in learner.parameters]
    return {"left whole": left, "equal": all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))}


def a_weight_that_is_not_finite_elsewhere(model: Path, folder: Path) -> dict:
    """What each process says if a number in the last process's part is NaN."""
    trainer = make_trainer(model, folder / "not finite", "GRPO")
    with trainer.models.use("policy") as policy:
        pass
    rollouts = rows_of(process())
    weight = policy.base_model.layers[1].mlp.down_proj.weight
    if process() == 1:
        with torch.no_grad():
            weight.to_local()[-1, 0] = torch.nan
    names = not_finite(policy)
    try:
        trainer.logprobs("policy", rollouts)
    except WrongNumbers as error:
        return {"names": names, "said": str(error)}
    return {"names": names, "said": ""}


def rows_that_share_a_prompt(model: Path, folder: Path) -> dict:
    """Whether a sharded policy gets packed rows, and how far their log-probs are from those of padded ones."""
    policy, _ = sharded(model, folder)
    rows, packing = rows_of(None), packing_of(policy)
    with torch.no_grad():
        padded, _ = sequence_logprobs(policy, Sequences.of(rows.to(device())), 1.0)
        packed, _ = sequence_logprobs(policy, Sequences.packed(rows, device()), 1.0)
    return {"packs": packing is not None, "difference": float((padded - packed).abs().max())}


def passes_without_a_backward_pass(model: Path, folder: Path) -> dict:
    """How many layers FSDP2 has noted of the reference's passes."""
    trainer = make_trainer(model, folder / "noted", "GRPO")
    with trainer.models.use("ref") as reference:
        pass
    for _ in range(2):
        trainer.logprobs("ref", rows_of(process()))
    state = reference._get_fsdp_state()
    return {"noted": len(state._comm_ctx.post_forward_order)}


class Shared(nn.Module):
    """Layers in lists, of which two share a weight, and a head beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
        self.layers[3].weight = self.layers[1].weight
        self.head = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, 1) from (n, 3)."""
        for layer in self.layers:
            inputs = inputs + layer(inputs).tanh()
        return self.head(inputs)


def layers_that_share_a_weight(model: Path, folder: Path) -> dict:
    """The gradient of such a model, whole and sharded, with rows on one process only."""
    one, two = Shared(), Shared()
    inputs = torch.arange(12.0).view(4, 3) / 10
    one(inputs).sum().backward()
    names = [name for name, module in two.named_modules() if module in blocks(two)]
    shard(two.to(device()), device())
    inputs = inputs.to(device())
    two(inputs if process() == 0 else 0 * inputs).mul(1 - process()).sum().backward()
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return {"blocks": names, "difference": max(float((a.grad - whole(b.grad).cpu()).abs().max()) for a, b in pairs)}


class Experts(nn.Module):
    """Two experts, of which a pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, inputs: Tensor, expert: int) -> Tensor:
        """(n, 2) from (n, 2)."""
        return self.experts[expert](inputs)


class Routed(nn.Module):
    """A model with a layer of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Experts()])

    def forward(self, inputs: Tensor, expert: int) -> Tensor:
        """(n, 2) from (n, 2)."""
        return self.layers[0](inputs, expert).tanh()


def an_expert_that_one_process_does_not_use(model: Path, folder: Path) -> dict:
    """The gradient of both experts if each process uses another one."""
    one, two = Routed(), Routed()
    inputs = torch.arange(4.0).view(2, 2)
    (one(inputs, 0) + one(inputs, 1)).sum().backward()
    shard(two.to(device()), device())
    two(inputs.to(device()), process()).sum().backward()
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return {"difference": max(float((a.grad - whole(b.grad).cpu()).abs().max()) for a, b in pairs)}


def the_host_keeps_parts(model: Path, folder: Path) -> dict:
    """What the optimizer on the host holds of a sharded model, and when gradients come there."""
    policy, learner = sharded(model, folder)
    learner.optimizer = HostAdamW([{"params": learner.parameters}])
    with learner.optimizer.receiving():
        loss_of(policy, rows_of(process())).backward()
    left = sum(p.grad is not None for p in learner.parameters)
    numbers = sum(master.numel() for master in learner.optimizer.masters.values())
    return {"numbers": numbers, "of": sum(p.numel() for p in learner.parameters), "left on the device": left}


FACTS = (
    a_pass_without_gradient_between_backward_and_step,
    names_while_whole,
    an_error_in_a_pass,
    a_weight_that_is_not_finite_elsewhere,
    rows_that_share_a_prompt,
    passes_without_a_backward_pass,
    layers_that_share_a_weight,
    an_expert_that_one_process_does_not_use,
    the_host_keeps_parts,
)

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
