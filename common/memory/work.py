"""What passes of a run's models need, as a plan asks for them: many budgets, few predictions.

A prediction by formula takes microseconds, one by fake layers seconds. The bytes of a pass grow with its rows, never
less than linearly: between two predictions the straight line is an upper bound.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import math

from common.config import RLConfig
from common.memory import constants
from common.memory.passes import PassBytes, pass_bytes
from common.memory.tenants import FLOAT32, Tenant
from common.models.configs import setting

# Tokens at which the second prediction by fake layers is made.
FAR = 32768


class Work:
    """Bytes of passes above weights, gradients and optimizer.

    Args:
        config: lengths and batch sizes are read.
        processes: that share a mini-batch.
        is_counted: False leaves passes out, with 0 bytes.
    """

    def __init__(self, config: RLConfig, processes: int = 1, *, is_counted: bool = True) -> None:
        self.processes, self.is_counted = processes, is_counted
        self.prompt, self.completion = config.max_prompt_length, config.max_completion_length
        rows = math.ceil(config.completions_per_step / config.num_minibatches / processes)
        self.most_rows = max(rows, 1)
        self.sources: frozenset[str] = frozenset()
        self._known: dict[tuple, PassBytes] = {}

    def of_settings(self, config: RLConfig, processes: int | None = None) -> Work:
        """The same for other settings, or so many processes, with the predictions that there are already."""
        other = Work(config, processes or self.processes, is_counted=self.is_counted)
        other._known = self._known
        return other

    @property
    def row(self) -> int:
        """Tokens of the longest row."""
        return self.prompt + self.completion

    def rows(self, budget: int) -> int:
        """Rows at full length in a micro-batch: at least one, which runs alone, and no more than a mini-batch has."""
        return min(max(budget // self.row, 1), self.most_rows)

    def of(self, model: Tenant, budget: int) -> PassBytes:
        """Passes of a policy, a reference or a value model with a micro-batch that fills its budget.

        Args:
            model: with pass settings.
            budget: padded tokens.
        """
        if not self.is_counted:
            return PassBytes(training=0, forward=0, source="")
        # Shorter rows may fill what whole ones leave of the budget.
        rows = max(min(budget / self.row, self.most_rows), 1)
        first = self._predicted(model, 1)
        low, high = math.floor(rows), math.ceil(rows)
        if first.source != "formula":
            low, high = 1, max(high, min(self.most_rows, FAR // self.row))
        ends = [self._predicted(model, each) for each in (low, high)]
        part = (rows - low) / max(high - low, 1)
        self.sources |= {first.source}

        def between(low: int, high: int) -> int:
            return round(low + part * (high - low))

        return PassBytes(
            training=between(*(each.training for each in ends)),
            forward=between(*(each.forward for each in ends)),
            source=first.source,
            phases={name: between(size, ends[1].phases[name]) for name, size in ends[0].phases.items()},
        )

    def _assumed(self, model: Tenant, rows: int) -> PassBytes:
        """Bytes of a pass of a model that cannot be predicted, on the safe side."""
        text, passes = model.config.get_text_config(), model.passes
        hidden = setting(text, "hidden_size", "d_model", "n_embd")
        inner = setting(text, "intermediate_size", "ffn_dim", "d_ff", "n_inner") or 4 * hidden
        layers = setting(text, "num_hidden_layers", "n_layer")
        width = constants.PASS_INTERMEDIATES * inner + constants.PASS_HIDDENS * hidden
        heads = 0 if model.has_flash else setting(text, "num_attention_heads") or 0
        each = rows * (self.row * width * passes.compute.itemsize + constants.PASS_SCORES * heads * self.row**2 * 4)
        kept = layers * (rows * self.row * hidden * passes.weights.itemsize if passes.checkpointing else each)
        head = 3 * FLOAT32 * text.vocab_size * hidden if passes.kind == "policy" else 0
        return PassBytes(training=each + kept + head, forward=each, source="an assumption")

    def _predicted(self, model: Tenant, rows: int) -> PassBytes:
        key = (id(model.config), model.passes, rows, self.prompt, self.completion)
        if key not in self._known:
            lengths = {"row_tokens": self.row, "completion_tokens": min(self.completion, self.row - 1)}
            try:
                self._known[key] = pass_bytes(model.config, model.passes, rows=rows, **lengths)
            except ValueError:  # nobody can tell: what is assumed is said in the plan
                self._known[key] = self._assumed(model, rows)
        return self._known[key]
