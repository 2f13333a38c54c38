"""What the workers of a server need beside vLLM: the corrections, a trial of the model, and weights over gloo.

vLLM imports this module in each of its workers, by --worker-extension-cls, before it builds a model. The process
samples and does nothing else, so what own engines correct for a while is corrected here for good.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.models.configs import read_config
from common.models.weights import complete_weights
from common.sampling import (
    server_transfer,
    vllm_corrections,
    vllm_drawing,
    vllm_reload,
    vllm_startup,
    vllm_support,
    vllm_trial,
)
from common.sampling.server_client import About
from common.sampling.vllm_startup import EngineSettings
from common.sampling.vllm_trial import Refused

# Environment variable with the file that tells workers what they serve, as JSON; it is there while a server starts.
FILE_VARIABLE = "NANORLHF_SERVER"
# How weights come on the CPU; on CUDA it is vLLM's own "nccl".
GLOO = "gloo"

# Contexts that are entered once and stay.
_for_good = ExitStack()


class Served:
    """What a server is about, read by each of its processes.

    Args:
        content: what `write` wrote.

    Attributes:
        settings: of its engine.
        shapes: of all tensors of a complete push, by checkpoint name.
        named: the model as its user named it.
        digest: of ModelIdentity.
        vocabulary: tokens.
        started: different after each start.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.settings = EngineSettings(**content["settings"])
        self.shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
        self.named: str = content["named"]
        self.digest: str = content["digest"]
        self.vocabulary: int = content["vocabulary"]
        self.started: str = content["started"]


def enter_corrections(served: Served) -> None:
    """Let vLLM in this process start, compute and draw as in own engines, until the process ends."""
    config = read_config(served.settings.model, trust_remote_code=served.settings.trust_remote_code)
    for context in (
        vllm_startup.without_side_effects(served.shapes),
        vllm_startup.cache_for(served.settings),
        vllm_corrections.kernels_for(served.settings.dtype),
        vllm_corrections.corrected_classes(config),
        vllm_drawing.quick_drawing(),
    ):
        _for_good.enter_context(context)
    register_gloo()


def register_gloo() -> None:
    """Let vLLM know the backend of this project for weights on the CPU."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if GLOO not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(GLOO, _gloo_engine())


def _gloo_engine() -> type:
    """The class of the backend; it cannot be defined before vllm is imported."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        master_address: str
        master_port: int
        world_size: int
        timeout: float
        rank_offset: int = 1

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        """Nothing: every tensor says itself what it is."""

    class GlooEngine(WeightTransferEngine):
        """Loads what comes as a first load would, by the function of own engines."""

        init_info_cls, update_info_cls = InitInfo, UpdateInfo
        group: Any = None

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            parallel = self.parallel_config
            number = parallel.data_parallel_index * parallel.world_size + parallel.rank
            self.group = server_transfer.join(
                init_info.master_address,
                init_info.master_port,
                rank=init_info.rank_offset + number,
                world_size=init_info.world_size,
                timeout=init_info.timeout,
            )

        def start_weight_update(self) -> None:
            """Nothing: all of it happens while weights come."""

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: UpdateInfo) -> None:
            if self.group is None:
                raise ValueError("weights before /init_weight_transfer_engine: nobody is there who could send them.")
            try:
                weights = complete_weights(server_transfer.receive(self.group), SERVED.shapes)
                vllm_reload.reload(self.model, weights, self.vllm_config)
            except BaseException:
                self.group = None  # closes its connections, so that the trainer does not wait
                raise

        def finish_weight_update(self) -> None:
            """Nothing is left to do."""

        def shutdown(self) -> None:
            self.group = None

    return GlooEngine


class Extension:
    """Methods that vLLM adds to its workers, for `collective_rpc`."""

    def nanorlhf_about(self) -> dict[str, Any]:
        """What the server is, as fields of About."""
        config = self.vllm_config
        transfer = config.weight_transfer_config
        return asdict(
            About(
                model=SERVED.named,
                digest=SERVED.digest,
                vocabulary=SERVED.vocabulary,
                dtype=SERVED.settings.dtype,
                max_model_len=config.model_config.max_model_len,
                max_num_seqs=config.scheduler_config.max_num_seqs,
                logprobs_mode=config.model_config.logprobs_mode,
                backend=transfer and transfer.backend,
                world_size=config.parallel_config.world_size_across_dp,
                started=SERVED.started,
            )
        )

    def nanorlhf_try_out(self) -> dict[str, str]:
        """Check the model that vLLM built and push zeros, as own engines do; the reason if it is refused."""
        model, settings = self.model_runner.model, SERVED.settings
        config = read_config(settings.model, trust_remote_code=settings.trust_remote_code)
        zeros = vllm_trial.zeros_of(
            SERVED.shapes, dtype=getattr(torch, settings.dtype), device=next(model.parameters()).device
        )
        try:
            vllm_corrections.use_bias_of_head(model)
            vllm_support.check_built_model(model, config, settings.max_model_len)
            with (
                vllm_trial.refused(settings.model, "take the weights of"),
                vllm_trial.all_read(zeros, type(model).__name__),
            ):
                vllm_reload.reload(model, zeros.items(), self.vllm_config)
        except (Refused, ValueError) as refusal:
            return {"refused": str(refusal)}
        return {}


SERVED: Served = None  # of this process, once it is a worker
if FILE_VARIABLE in os.environ:
    SERVED = Served(json.loads(Path(os.environ[FILE_VARIABLE]).read_text(encoding="utf-8")))
    enter_corrections(SERVED)
