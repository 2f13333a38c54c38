"""A push of the policy's weights to a sampler, by all processes together if the policy is spread over them.

Each tensor is then gathered from all processes. One that stopped in the middle would leave the others waiting for it,
so it goes on to the end before it fails, and all fail with it.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from common.logprobs import without_adapter
from common.mistakes import first_line
from common.models.weights import OnDevice, policy_weights
from common.sampling.protocol import Sampler
from common.sharding import is_sharded, of_all


def push_policy(sampler: Sampler, model: nn.Module, on_device: OnDevice | None) -> None:
    """Replace a sampler's weights by those of the policy.

    Args:
        sampler: awake, at least its weights.
        model: the policy; if it is spread over processes, all of them call this together.
        on_device: as in policy_weights.

    Raises:
        ValueError: if another process could not take the weights; says which, and why.
        Exception: whatever the sampler or policy_weights raises on this process.
    """
    if not is_sharded(without_adapter(model)):
        sampler.push(policy_weights(model, on_device))
        return
    weights = Watched(policy_weights(model, on_device, sampler.weights_dtype))
    failure = None
    try:
        sampler.push(weights)
    except Exception as error:
        failure = error
    if weights.is_broken:
        # This process cannot take part any more. It ends, and the launcher ends the others.
        raise failure
    for _ in weights:
        pass
    _fail_together(failure)


class Watched:
    """The weights of a push, for whoever takes them; knows whether making one of them failed.

    Args:
        weights: (checkpoint name, tensor).

    Attributes:
        is_broken: making one raised, so that there are no more.
    """

    def __init__(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._weights = weights
        self.is_broken = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        try:
            return next(self._weights)
        except StopIteration:
            raise
        except BaseException:
            self.is_broken = True
            raise


def _fail_together(failure: Exception | None) -> None:
    """Raise this process's failure, or that of another one."""
    reason = failure and f"{type(failure).__name__}: {first_line(failure)}"
    everyone = of_all(reason)
    if failure is not None:
        raise failure
    if failed := [f"process {process} ({each})" for process, each in enumerate(everyone) if each]:
        raise ValueError(
            f"push of the policy's weights: the sampler of {' and '.join(failed)} did not take them, and with shard="
            "full all processes sample from the same weights, so all of them end. The output of that process says "
            "more. Start the same command again; it continues from the last checkpoint, if there is one."
        )
