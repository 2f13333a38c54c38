"""Models of an algorithm that are not trained, such as a teacher: they give log-probs of the policy's tokens.

One is named as any model is: a hub id, a folder, a run or a checkpoint of one, or a LoRA adapter. It is in the
precision of forward passes and has the attention that fits it; load_in_4bit is for the policy alone, since rounded
weights would be another model's opinion. What is wrong with one is said before anything is loaded.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.utils import CONFIG_NAME

from common.config import OtherModel, RLConfig
from common.data.cache import sample_digest
from common.embedded import is_embedded, load_tokenizer, resolve_model, skeleton
from common.logprobs import without_adapter
from common.models.bases import is_there
from common.models.configs import ADAPTER_CONFIG, read_config, why_quantized
from common.models.loading import load_frozen
from common.models.parts import is_spread
from common.models.positions import check_room
from common.runs.sources import Source, commit_on_hub, find_model, shapes_in
from common.sharding import of_all, own_part

# Parts of a file by which it is known again: its beginning, its middle and its end.
_SAMPLES = {"sample_bytes": 2**20, "num_samples": 3}
# Files that say what a model computes.
_WEIGHTS = (".safetensors", ".bin")
# Tokens that a message names.
_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A model that is not trained, found and not loaded.

    Attributes:
        other: its name in the pool, and the setting that names it.
        source: the base, and the adapter on top of it.
        base: the base, without storage.
    """

    other: OtherModel
    source: Source
    base: transformers.PreTrainedModel

    @property
    def label(self) -> str:
        """The setting with its value, for messages."""
        return f"{self.other.setting}={self.other.path!r}"

    @property
    def adapter_sizes(self) -> tuple[int, ...]:
        """Numbers in each matrix of its adapter; none without one."""
        if self.source.adapter is None:
            return ()
        return tuple(torch.Size(shape).numel() for shape in shapes_in(self.source.adapter).values())

    def check_tokens(
        self, tokenizer: transformers.PreTrainedTokenizerBase, num_tokens: int, config: RLConfig
    ) -> list[str]:
        """Refuse a model for which the policy's token ids mean something else.

        The sizes alone do not tell: models of one family fill their embeddings up to different numbers of rows.

        Args:
            tokenizer: the policy's.
            num_tokens: rows of the policy's embedding; it can sample all of them.
            config: trust_remote_code is read.

        Returns:
            Lines about what differs and is allowed: the end of a text, and the chat template.

        Raises:
            ValueError: names tokens that differ, or both numbers of rows.
        """
        with _named(self.other):
            own = load_tokenizer(self.source.own_tokenizer, trust_remote_code=config.trust_remote_code)
        theirs, ours = own.get_vocab(), tokenizer.get_vocab()
        by_id = {number: token for token, number in theirs.items()}
        different = sorted(
            (number, token) for token, number in ours.items() if theirs.get(token) != number and number < num_tokens
        )
        if different:
            named = [
                f"Token {number} is {token!r} for the policy, and {_or_nothing(by_id.get(number))} for it"
                for number, token in different[:_MOST_NAMED]
            ]
            raise ValueError(
                f"{self.label}: it has another vocabulary than the policy: of {len(ours):,} tokens {len(different):,} "
                f"differ. {'; '.join(named)}. It judges the policy's token ids, so each must be the same token in "
                f"both. Pass --{self.other.setting} with a model of the policy's family, or another --model."
            )
        rows = self.base.config.get_text_config().vocab_size
        if rows < num_tokens:
            raise ValueError(
                f"{self.label}: it has {rows:,} tokens, and the policy can sample {num_tokens:,}: it has no log-prob "
                f"for the others. Pass --{self.other.setting} with a model that has as many, or a smaller --model."
            )
        lines = []
        if own.eos_token != tokenizer.eos_token:
            lines.append(
                f"{self.label}: its texts end with {own.eos_token!r}, the policy's with {tokenizer.eos_token!r}: it "
                "may find it unlikely that the policy ends, and teach it to go on"
            )
        if tokenizer.chat_template and own.chat_template != tokenizer.chat_template:
            lines.append(f"{self.label}: it reads prompts as the policy's chat template writes them, not as its own")
        return lines

    def identity(self) -> str:
        """What changes when its weights do, so that a run is continued with the same: a digest of parts of its files.

        A folder may be moved and copied. Of a model on the hub it is the commit.
        """
        found = hashlib.sha256()
        for name in (resolve_model(self.source.base), self.source.adapter):
            if name is not None and not Path(name).is_dir():
                found.update((commit_on_hub(str(name)) or str(name)).encode())
                continue
            files = [] if name is None else sorted(Path(name).iterdir())
            for file in files:
                if file.suffix in _WEIGHTS or file.name == CONFIG_NAME:
                    found.update(f"{file.name} {sample_digest(file, **_SAMPLES)}".encode())
                elif file.name == ADAPTER_CONFIG:
                    found.update(_without_base(file))
        return found.hexdigest()

    def load(self, config: RLConfig, *, dtype: torch.dtype, policy: nn.Module | None) -> nn.Module:
        """Load it on the CPU, or with shard=full each process its own part.

        Args:
            config: the run's.
            dtype: precision of forward passes, in which its weights are.
            policy: which it must not be; None: the policy has been trained since, so that it cannot tell.

        Raises:
            ValueError: it cannot be loaded, or is the policy itself.
        """
        with _named(self.other):
            model = load_frozen(resolve_model(self.source.base), config, dtype=dtype, adapter=self.source.adapter)
        if policy is not None:
            is_same = _is_same(model, policy)
            if all(of_all(is_same)) if is_spread(config) else is_same:
                raise self._is_the_policy("every weight is that of the policy")
        return model

    def check_differs(self, config: RLConfig) -> None:
        """Refuse the policy itself, as far as names tell.

        Raises:
            ValueError: says so.
        """
        base, model = self.source.base, config.model
        is_same = base == model or (is_there(base) and is_there(model) and os.path.samefile(base, model))
        if is_same and self.source.adapter is None:
            raise self._is_the_policy("both are the same model")

    def _is_the_policy(self, why: str) -> ValueError:
        return ValueError(
            f"{self.label}: {why}, so that their log-probs are the same and there is nothing to learn from it. Pass "
            f"--{self.other.setting} with another model, such as final/ of a run that has trained this one."
        )


def find_frozen(config: RLConfig, *, is_planned: bool = False) -> list[Frozen]:
    """The algorithm's models that are not trained, checked as far as names, configurations and headers tell.

    Args:
        config: the run's.
        is_planned: for a plan a configuration is enough, as it is of the policy.

    Raises:
        ValueError: there is no such model, it is no causal language model in floating point, it has too few positions,
            or it is the policy itself.
    """
    return [_found(other, config, is_planned) for other in config.other_models if not other.is_trained]


def for_plan(found: list[Frozen]) -> dict[str, tuple[transformers.PreTrainedModel, tuple[int, ...]]]:
    """What a memory plan takes of them, by name: see Casting."""
    return {each.other.name: (each.base, each.adapter_sizes) for each in found}


def _found(other: OtherModel, config: RLConfig, is_planned: bool) -> Frozen:
    setting = other.setting
    if other.path is None:
        raise ValueError(
            f"{setting}=None: the algorithm needs this model, and there is no default for it. Pass --{setting} with a "
            "hub id, a folder such as final/ of a run, or a LoRA adapter."
        )
    with _named(other):
        _refuse_quantized(other.path, config)
        if is_planned and (Path(other.path) / CONFIG_NAME).is_file():
            source = Source(base=other.path, what=other.path)
        else:
            source = find_model(other.path, trust_remote_code=config.trust_remote_code)
        base = skeleton(source.base)
        check_room(base, config, setting=setting)
    frozen = Frozen(other=other, source=source, base=base)
    frozen.check_differs(config)
    return frozen


def _refuse_quantized(path: str, config: RLConfig) -> None:
    """What is said of a policy is of no use here: nobody trains this one."""
    if is_embedded(path) or not (Path(path) / CONFIG_NAME).is_file():
        return
    reason = why_quantized(read_config(path, trust_remote_code=config.trust_remote_code))
    if reason is not None:
        raise ValueError(
            f"model={path!r}: {reason.partition(':')[0]}: such weights need kernels of their own, and cannot be moved "
            "and counted as tensors are. Pass the model that it was made from."
        )


@contextmanager
def _named(other: OtherModel) -> Iterator[None]:
    """Say of errors about a model which setting names it; most are written for the setting `model`."""
    try:
        yield
    except ValueError as error:
        text = str(error).replace("--model", f"--{other.setting}")
        text = text.removeprefix(f"model={other.path!r}: ").removeprefix(f"model={other.path}: ")
        raise ValueError(f"{other.setting}={other.path!r}: {text}") from error


def _or_nothing(token: str | None) -> str:
    return "none" if token is None else repr(token)


def _without_base(file: Path) -> bytes:
    """An adapter's settings, such as the scale of its weights, without the place where its base lies."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("base_model_name_or_path", None)
    return json.dumps(settings, sort_keys=True).encode()


@torch.no_grad()
def _is_same(model: nn.Module, policy: nn.Module) -> bool:
    """Whether a model computes what the policy does: equal weights, in its own precision, and no adapter adds any.

    A policy in 4 bits is rounded, and so another model; its packed weights have shapes of their own.
    """
    if any(own_part(each).any() for each in _adapter_ends(model)):
        return False
    theirs, ours = _weights(model), _weights(policy)
    if theirs.keys() != ours.keys() or any(theirs[name].shape != ours[name].shape for name in theirs):
        return False
    return all(torch.equal(mine, ours[name].to(mine)) for name, mine in theirs.items())


def _adapter_ends(model: nn.Module) -> list[torch.Tensor]:
    """The second matrices of an adapter, which begin at 0."""
    return [each for name, each in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name]


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """This process's part of each weight, adapters left out, by the names that they have without one."""
    named = without_adapter(model).named_parameters()
    return {name.replace(".base_layer.", "."): own_part(each) for name, each in named if ".lora_" not in name}
