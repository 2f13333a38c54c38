"""Whether the numbers of a run can be right; what cannot stops the run before its policy learns from it.

NaN and infinity fail every check: nothing here asks whether a number is too large, only whether it is small enough.
All processes call the checks that stop a run, with numbers summed over processes, so all of them stop together.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.config import RLConfig
from common.mistakes import WrongNumbers, where_to_go_on
from common.models.weights import not_finite
from common.rollouts import Rollouts
from common.update.learner import MetricPart

logger = logging.getLogger("nanorlhf")

DIFFERENCE, RATIO = "sampler/logprob_diff", "policy/first_ratio"

# Bounds of the mean |sampler's log-prob - trainer's log-prob|. In float32, tiny models of 111 architectures that vLLM
# and transformers compute alike differed by at most 7e-6. Of those that one of them computes in another way, an exact
# GELU in place of an approximate one gave 1.7e-4, ALiBi rounded to bfloat16 0.0008 to 0.002, an attention window that
# is off by one token 0.035, a missing soft cap 0.68, wrong experts 0.4 to 2.9. In bfloat16, two layers with weights of
# deviation 0.06 and 0.3 gave 0.003 and 0.05 by rounding alone; models of many layers were not measured, so the bound
# leaves them ten times that.
SUSPICIOUS = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # larger than rounding should be: a warning
IMPOSSIBLE = {torch.float32: 1e-2, torch.bfloat16: 0.5}  # no rounding of any model: the run stops

# Of completions of the policy of one step earlier, the difference holds what that step has changed, too. In runs that
# learn it was 0.006 on average and 0.026 at most; with this much, nearly every token's probability is another one.
LAGGED = 0.5

# A warning comes again when what it is about has grown by this factor.
GROWTH = 10

_ROLES = {"policy": "the policy", "ref": "the reference", "value": "the value model"}
_KEEPS = "A run keeps its settings, so other ones need another --output_dir"


class Soundness:
    """The checks of a run.

    Args:
        config: the run's; `sampler`, `max_logprob_diff` and `attn_implementation` are read.
        dtype: precision of forward passes.
        sum_over_processes: adds a tensor over all processes; the identity on one process.
    """

    def __init__(
        self, config: RLConfig, dtype: torch.dtype, *, sum_over_processes: Callable[[Tensor], Tensor]
    ) -> None:
        self._config, self._dtype = config, dtype
        self._dtype_name = str(dtype).removeprefix("torch.")
        self._sum = sum_over_processes
        self._said: dict[str, float] = {}  # size of what was last warned of

    # ------------------------------------------------------------------------------ on all processes: stop the run

    def check_outputs(self, name: str, outputs: Tensor, model: nn.Module, *, step: int) -> None:
        """Refuse outputs of a model, such as log-probs, that are not finite.

        Args:
            name: the model's in the pool.
            outputs: any shape, float, 0 at padding.
            model: gave them.
            step: the step; 0 before the first one.

        Raises:
            WrongNumbers: on all processes, with the likely causes.
        """
        if num_bad := self._num_bad(outputs):
            raise WrongNumbers(self._of_model(name, f"{num_bad} of its outputs", model, step))

    def all_finite(self, rollouts: Rollouts) -> bool:
        """Whether the sampler's log-probs are finite on all processes."""
        return not self._num_bad(rollouts.sampling_logprobs)

    def sampler_is_wrong(self, *, step: int) -> WrongNumbers:
        """The error for log-probs of the sampler that are not finite where those of the policy are."""
        return WrongNumbers(
            f"{_when(step)}: log-probs of the sampler are not finite (NaN or infinite), those of the policy for the "
            f"same completions are. So {self._config.sampler} fails with this model or these lengths, and what it "
            f"drew has nothing to do with the policy.\n{self._likely_causes(step, math.nan)}\n{self._way_out()}"
        )

    def check_first_minibatch(
        self, parts: list[MetricPart], model: nn.Module, *, step: int, lagged: bool = False
    ) -> None:
        """Refuse a policy that differs from the one that sampled, before its first optimizer step of a rollout.

        Args:
            parts: this process's of the metrics of the mini-batch.
            model: the policy.
            step: the step.
            lagged: the completions are of the policy of one step earlier, so that the difference is no rounding alone.

        Raises:
            WrongNumbers: on all processes, with the likely causes and the way out.
        """
        own = [(total, count) for name, total, count in parts if name == DIFFERENCE]
        if not own:  # a loss of one's own need not report it
            return
        # On the device until they are one tensor: each copy from there waits for it.
        device = next(model.parameters()).device
        sums = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=device) for pair in own for value in pair]
        )
        total, count = self._sum(sums.reshape(-1, 2).sum(0).cpu()).tolist()
        difference = total / count if count else 0.0
        if not math.isfinite(difference):  # the sampler's log-probs are finite, or the step would not be here
            raise WrongNumbers(self._of_model("policy", "log-probs", model, step))
        bound = self._config.max_logprob_diff
        if bound is None:
            bound = LAGGED if lagged else IMPOSSIBLE[self._dtype]
        if not difference <= (bound or math.inf):
            raise WrongNumbers(
                f"{_when(step)}: log-probs of sampler and trainer differ by {difference:.4g} on average, and "
                f"{self._explained(bound, lagged)}. The sampler does not draw from the policy that is trained, so its "
                "completions would teach something else. This step has changed no weight.\n"
                f"{self._likely_causes(step, difference, lagged)}\n{self._way_out()} --max_logprob_diff 0 goes on "
                "anyway."
            )

    def check_losses(self, metrics: dict[str, float], *, step: int) -> None:
        """Refuse a loss that is not finite although its gradient was, before a checkpoint is saved.

        Args:
            metrics: the step's, reduced over processes.
            step: the step.

        Raises:
            WrongNumbers: on all processes.
        """
        for name, value in metrics.items():
            if name.endswith("/loss") and not math.isfinite(value):
                raise WrongNumbers(
                    f"{_when(step)}: {name} is {value}. The gradient was finite, so a part of the loss without a "
                    "gradient is not. Look at the loss of the algorithm. No checkpoint of this step is written.\n"
                    f"{where_to_go_on(step)}".rstrip()
                )

    # --------------------------------------------------------------------------- on the main process: warn, and go on

    def warn(self, metrics: dict[str, float], *, step: int, same_passes: bool = True, lagged: bool = False) -> None:
        """Warn of what is not right but may go on; each is said again only when it has grown tenfold.

        Args:
            metrics: the step's, reduced over processes.
            step: the step.
            same_passes: False if log-probs of the step were computed in other passes than its updates, for want of
                memory: then its first ratio is 1 up to rounding.
            lagged: as in `check_first_minibatch`.
        """
        # With a lag the ratio is to the sampler's log-probs: no two passes over the same tokens are compared.
        ratio = 1.0 if self._config.sampling_lag else metrics.get(RATIO, 1.0)
        if ratio != 1.0 and same_passes and self._is_news(RATIO, abs(ratio - 1)):
            logger.warning(
                "step %d: the ratio before the first optimizer step is %.8f, not 1: two forward passes over the same "
                "tokens differ. Look for dropout or other randomness in the model.",
                *(step, ratio),
            )
        difference, bound = metrics.get(DIFFERENCE, 0.0), math.inf if lagged else SUSPICIOUS[self._dtype]
        if not difference <= bound and self._is_news(DIFFERENCE, difference):
            logger.warning(
                "step %d: log-probs of sampler and trainer differ by %.2g on average, and rounding in %s explains "
                "%g: they may not run the same model.%s",
                *(step, difference, self._dtype_name, bound),
                " --sampler transformers shows whether vLLM is the cause."
                if self._config.sampler != "transformers"
                else "",
            )
        for name, value in metrics.items():
            is_ours = "logged/" not in name and name not in (RATIO, DIFFERENCE)  # reward functions log what they like
            if is_ours and not math.isfinite(value) and self._is_news(name, math.inf):
                logger.warning("step %d: %s is %s, and metrics.jsonl has null for it from now on.", step, name, value)

    def _is_news(self, name: str, size: float) -> bool:
        """True for the first time, and when the size has grown by GROWTH; a NaN is larger than any number."""
        size = math.inf if math.isnan(size) else size
        if name in self._said and not (self._said[name] < math.inf and size >= GROWTH * self._said[name]):
            return False
        self._said[name] = size
        return True

    # -------------------------------------------------------------------------------------------------------- texts

    def _num_bad(self, values: Tensor) -> int:
        """Values that are not finite, over all processes."""
        return int(self._sum((~values.isfinite()).sum()))

    def _explained(self, bound: float, lagged: bool) -> str:
        if self._config.max_logprob_diff is not None:
            return f"max_logprob_diff={self._config.max_logprob_diff:g} allows no more"
        if lagged:
            return f"the one step that lies between them explains no more than {bound:g}"
        return f"no rounding in {self._dtype_name} explains more than {bound:g}"

    def _of_model(self, name: str, what: str, model: nn.Module, step: int) -> str:
        """Why outputs of a model are not finite, as far as its weights tell."""
        role = _ROLES.get(name, f"the model {name!r}")
        head = f"{_when(step)}: {role}: {what} are not finite (NaN or infinite)"
        if bad := not_finite(model):
            more = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
            return (
                f"{head}, nor are its weights: {bad[0]}{more}. Likely causes:\n* the files of the checkpoint are "
                "damaged, or were made by a training that had failed: load it elsewhere, or take another --model\n"
                "* an update spoiled them, if the run had good steps before: a lower --learning_rate\n"
                f"{where_to_go_on(step)}"
                f"No update has been made with these numbers. {_KEEPS}."
            )
        return (
            f"{head}, though all its weights are. Likely causes:\n"
            f"* numbers too large for {self._dtype_name}: --dtype float32, or a lower --learning_rate if the run had "
            "good steps before\n"
            f"* attention or rope of this architecture: another --attn_implementation than "
            f"{self._config.attn_implementation}, such as eager\n"
            f"{where_to_go_on(step)}"
            f"No update has been made with these numbers. {_KEEPS}."
        )

    def _likely_causes(self, step: int, difference: float, lagged: bool = False) -> str:
        attention, causes = self._config.attn_implementation, []
        if lagged:
            causes.append("* the last update changed the policy beyond what a lag allows: a lower --learning_rate")
        if self._config.sampler != "transformers":
            causes.append("* vLLM computes this architecture in another way (rope, window, experts, logit scaling)")
            if attention != "eager" and math.isfinite(difference):
                causes.append(
                    f"* the trainer's attn_implementation={attention} leaves out what the model needs, such as a soft "
                    "cap or sinks: --attn_implementation eager"
                )
            if step > 1:
                causes.append("* the last update did not reach vLLM, or made weights huge: a lower --learning_rate")
        else:
            causes.append("* the model's cache: token by token it computes something else than all tokens at once")
            causes.append("* randomness in forward passes of training, such as dropout or router jitter")
        return "Likely causes:\n" + "\n".join(causes)

    def _way_out(self) -> str:
        if self._config.sampler != "transformers":
            return f"--sampler transformers samples from the policy itself. {_KEEPS}."
        return f"--attn_implementation eager --dtype float32 is the most exact that there is. {_KEEPS}."


def _when(step: int) -> str:
    return f"step {step}" if step else "before the first step"
