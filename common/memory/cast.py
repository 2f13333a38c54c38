"""Everybody who takes memory in a run, from its settings and from models without storage."""

from __future__ import annotations  # for type hints whose import would take seconds

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers

from common.config import OtherModel, RLConfig
from common.memory.cards import Card
from common.memory.passes import PassSettings
from common.memory.tenants import FLOAT32, Engine, Numbers, Sizes, Tenant, engine, frozen, learner
from common.models.attention import attention_for
from common.models.configs import model_class, read_config
from common.models.loading import compute_dtype, trained_dtype

# Attention of transformers that makes no matrix of all pairs of tokens on CUDA.
FLASH = ("sdpa", "flash_attention_2", "flex_attention")


@dataclass(frozen=True, kw_only=True)
class Cast:
    """Everybody who takes memory in a run.

    Attributes:
        policy: the learner.
        others: reference, value model, models that are not trained, reward models.
        engine: the sampler.
        server: what vLLM's server has on each of its devices, of which it may have several; None: there is none.
        sizes: of the policy.
        not_counted: what could not be counted, in words.
    """

    policy: Tenant
    others: tuple[Tenant, ...] = ()
    engine: Engine
    server: Engine | None = None
    sizes: Sizes
    not_counted: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[Tenant, ...]:
        """The policy first."""
        return (self.policy, *self.others)


def spread_over(config: RLConfig, processes: int) -> int:
    """Processes that the tensors of policy, reference and value model are spread over; 1: each has whole ones."""
    return processes if config.shard == "full" else 1


class Casting:
    """Finds who takes memory, for one run and for the changes of its settings that might let it fit.

    Args:
        config: the run's settings.
        policy: without storage.
        card: the device.
        rewards: hub ids or folders of reward models.
        frozen: the algorithm's models that are not trained, without storage, by name; and the numbers in each matrix
            of an adapter on one.
        processes: that train together.
        is_trained: False for an evaluation, which only samples.
    """

    def __init__(
        self,
        config: RLConfig,
        policy: transformers.PreTrainedModel,
        card: Card,
        *,
        rewards: Sequence[str] = (),
        frozen: Mapping[str, tuple[transformers.PreTrainedModel, Sequence[int]]] | None = None,
        processes: int = 1,
        is_trained: bool = True,
    ) -> None:
        self._frozen = {
            name: (model, Sizes.of(model, config), adapter) for name, (model, adapter) in (frozen or {}).items()
        }
        self.policy, self.card, self.processes, self.is_trained = policy, card, processes, is_trained
        self.sizes = Sizes.of(policy, config)
        self._of_paths: dict[str, Sizes] = {}
        self._rewards: list[Tenant] = []
        self.not_counted: list[str] = []
        for path in rewards:
            self._add_reward(path, config)

    def cast(self, config: RLConfig, processes: int | None = None) -> Cast:
        """Everybody, with these settings.

        Args:
            config: the run's, or the run's with a change in what memory it takes.
            processes: that train together; None: those of the run.
        """
        device, processes = torch.device(self.card.kind), processes or self.processes
        dtype = compute_dtype(config, device)
        is_cuda = device.type == "cuda"
        numbers = Numbers(
            dtype=dtype,
            processes=processes,
            spread=spread_over(config, processes),
            attention=self._attention_of(self.policy, config.attn_implementation, dtype),
            is_fused=is_cuda,
        )
        policy = learner("policy", self.sizes, config, numbers)
        if not self.is_trained:
            policy = frozen("policy", self.sizes, replace(policy.passes, method="full", weights=dtype))
        others = [self._reference(policy, config, numbers)] if config.kl_coef or config.eval_kl else []
        for other in config.other_models:
            if not other.is_trained:
                others.append(self._not_trained(other.name, policy, numbers))
                continue
            sizes = self._sizes_of(other, config) if other.path else self.sizes
            options = {"needs": "policy" if other.shares_base else None, "has_head": False, "may_pack": False}
            others.append(learner(other.name, sizes, config, numbers, **options))
        samples = partial(engine, self.sizes, dtype=dtype, on_cpu=not is_cuda)
        of_server = replace(config, sampler="vllm", sampler_url=None) if config.sampler == "vllm_server" else None
        return Cast(
            policy=policy,
            others=(*others, *self._rewards),
            engine=samples(config, processes=processes, spread=numbers.spread),
            server=of_server and samples(of_server, processes=of_server.vllm_tensor_parallel),
            sizes=self.sizes,
            not_counted=tuple(self.not_counted),
        )

    def _reference(self, policy: Tenant, config: RLConfig, numbers: Numbers) -> Tenant:
        """A view of the policy with LoRA, else a copy of its weights."""
        if policy.passes.method != "full":
            shared = {"needs": "policy", "passes": policy.passes, "gathered": policy.gathered}
            return Tenant(name="ref", weights=0, config=policy.config, **shared)
        kept = trained_dtype(config, numbers.dtype)
        return frozen("ref", self.sizes, policy.passes, kept=kept, spread=numbers.spread)

    def _not_trained(self, name: str, policy: Tenant, numbers: Numbers) -> Tenant:
        """A model that gives log-probs, in what passes compute in, with the attention that fits it."""
        model, sizes, adapter = self._frozen[name]
        attention = self._attention_of(model, "auto", numbers.dtype)
        passes = replace(policy.passes, method="full", weights=numbers.dtype, attention=attention)
        tenant = frozen(name, sizes, passes, spread=numbers.spread)
        matrices = tuple(FLOAT32 * -(-size // numbers.spread) for size in adapter)
        return replace(tenant, weights=tenant.weights + sum(matrices), home=(*tenant.home, *matrices))

    def _attention_of(self, model: transformers.PreTrainedModel, asked: str, dtype: torch.dtype) -> str:
        device = torch.device(self.card.kind)
        chosen, _ = attention_for(model.config, asked, device, dtype=dtype, cls=type(model))
        return "flash" if chosen in FLASH and device.type == "cuda" else chosen

    def _sizes_of(self, other: OtherModel, config: RLConfig) -> Sizes:
        """Of the model that another one is made of."""
        if other.path not in self._of_paths:
            label = f"{other.setting}={other.path!r}"
            self._of_paths[other.path] = Sizes.of(_skeleton(other.path, label), config)
        return self._of_paths[other.path]

    def _add_reward(self, path: str, config: RLConfig) -> None:
        name = f"reward model {path!r}"
        try:
            model = _skeleton(path, name)
        except ValueError:  # a run that loads it says why
            self.not_counted.append(f"{name}, whose configuration cannot be read here")
            return
        on_cuda = self.card.kind == "cuda"
        dtype = (model.config.dtype or torch.float32) if on_cuda else compute_dtype(config, torch.device("cpu"))
        has_flash = bool(type(model)._supports_sdpa)
        passes = PassSettings(
            kind="score",
            method="full",
            weights=dtype,
            compute=dtype,
            checkpointing=False,
            attention="flash" if has_flash and self.card.kind == "cuda" else "sdpa" if has_flash else "eager",
        )
        sizes = Sizes(
            config=model.config,
            weights=tuple(each.numel() for each in model.parameters()),
            packed=0,
            adapter=(),
            head=0,
            width=0,
        )
        short = path.rstrip("/").split("/")[-1]
        self._rewards.append(frozen(f"reward/{short}", sizes, passes, has_flash=has_flash))


def _skeleton(path: str, label: str) -> transformers.PreTrainedModel:
    """A model that gives scores, without storage."""
    config = read_config(path, label=label)
    classes = (transformers.AutoModelForSequenceClassification, transformers.AutoModel)
    auto = next(each for each in classes if model_class(config, each) is not None)
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False)
