"""A sampler with weights of its own and without an engine: a whole copy of the policy, and transformers' decoding.

Tests of several processes use it where samplers are not what they test: an engine takes longer to start than all the
rest. It is pushed to as vLLM is, so every process has to gather the policy.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import pytest
import torch
import transformers
from torch import Tensor

import common.trainer
from common.sampling.torch_sampler import TransformersSampler


class OwnCopy(TransformersSampler):
    """Samples from its copy of the policy.

    Args:
        path: folder of the policy.
    """

    needs_push = True

    def __init__(self, path: str) -> None:
        self._copy = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.has_weights = False
        super().__init__(lambda: nullcontext(self._copy), device=torch.device("cpu"))

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy all weights."""
        missing, unknown = self._copy.load_state_dict({name: each.clone() for name, each in weights}, strict=False)
        assert not unknown and set(missing) <= set(self._copy.all_tied_weights_keys)
        self.has_weights = True


def use_own_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have trainers take it in place of vLLM."""
    monkeypatch.setattr(common.trainer, "make_sampler", lambda config, path, **_: OwnCopy(path))
    monkeypatch.setattr(common.trainer, "check_sampling", lambda *_: None)
