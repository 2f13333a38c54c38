"""The process of a server: vLLM's API server, with the engine, the corrections and the trial of own engines.

`common/serve.py` starts it, with its settings as one argument; nobody types that. It ends with Ctrl-C or SIGTERM.
"""

import asyncio
import json
import logging
import os
import sys
import tempfile
import uuid
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.mistakes import first_line
from common.models.configs import read_config
from common.models.weights import checkpoint_shapes
from common.sampling import vllm_startup, vllm_support
from common.sampling.server_client import QUICK, ModelIdentity, ServerClient, ServerFailed
from common.sampling.vllm_memory import start_remedy
from common.sampling.vllm_server_worker import FILE_VARIABLE, GLOO, Served, enter_corrections
from common.sampling.vllm_startup import EngineSettings
from common.sampling.vllm_trial import Refused


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        engine: fields of EngineSettings.
        named: the model as its user named it.
        host: address that it listens at.
        port: of it.
        tensor_parallel: processes that share the model.
    """

    engine: dict[str, Any]
    named: str
    host: str
    port: int
    tensor_parallel: int = 1


def main() -> None:
    """Serve until a signal comes."""
    import uvloop

    settings = ServerSettings(**json.loads(sys.argv[1]))
    if os.environ.get("VLLM_LOGGING_LEVEL") == "ERROR":  # nobody asked for more
        logging.disable(logging.WARNING)
    try:
        uvloop.run(_serve(settings))
    except (Refused, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


async def _serve(settings: ServerSettings) -> None:
    engine = EngineSettings(**settings.engine)
    config = read_config(engine.model, trust_remote_code=engine.trust_remote_code)
    vllm_support.check_configuration(config, engine.max_model_len)
    shapes = checkpoint_shapes(engine.model, config)  # first: vLLM replaces configuration classes of transformers
    identity = ModelIdentity.of(config, shapes)
    content = {
        "settings": asdict(engine),
        "shapes": shapes,
        "named": settings.named,
        "digest": identity.digest,
        "vocabulary": identity.vocabulary,
        "started": uuid.uuid4().hex,
    }
    if not torch.cuda.is_available():
        os.environ["VLLM_MLA_DISABLE"] = "1"  # see vllm_support.imported
    arguments = vllm_startup.engine_arguments(engine, config)
    supported = vllm_support.supported_config(arguments)
    if vllm_support.has_state(supported):
        arguments["enable_prefix_caching"] = False
    arguments |= {
        "tensor_parallel_size": settings.tensor_parallel,
        "worker_extension_cls": "common.sampling.vllm_server_worker.Extension",
        "weight_transfer_config": _transfer(),
    }
    with tempfile.TemporaryDirectory(prefix="nanorlhf-server-") as folder:
        file = Path(folder) / "served.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        os.environ[FILE_VARIABLE] = str(file)
        enter_corrections(Served(content))
        refusal = await _run(arguments, settings)
        if refusal and not (supported.using_transformers_backend() or vllm_support.has_routing_bias(shapes)):
            print(f"{refusal} It samples from transformers' own class instead, which is slower.", flush=True)
            if await _run(arguments | {"model_impl": "transformers"}, settings) is None:
                return
        if refusal:
            raise ValueError(refusal)


def _transfer() -> Any:
    from vllm.config.weight_transfer import WeightTransferConfig

    return WeightTransferConfig(backend="nccl" if torch.cuda.is_available() else GLOO)


async def _run(arguments: dict[str, Any], settings: ServerSettings) -> str | None:
    """Serve an engine with these arguments until a signal comes; if it is refused before, the reason."""
    launcher = _launcher()
    args = _namespace(arguments, settings)
    address, listening = launcher.setup_server(args, reuse_port=False)
    is_built = False
    try:
        async with launcher.build_async_engine_client(args) as client:
            is_built = True
            results = await client.collective_rpc("nanorlhf_try_out")
            refusals = [result["refused"] for result in results if result]
            if refusals:
                return refusals[0]
            await _sample_once(client)
            announced = asyncio.create_task(_announce(settings.named, address))
            shutdown = await launcher.build_and_serve(client, address, listening, args)  # returns when it ends
            announced.cancel()
        await shutdown
    except RuntimeError as error:  # of the engine's process, which has printed its own
        if is_built:
            raise
        text = f"vLLM cannot build {settings.named}: {first_line(error)}. What its engine printed above says why."
        return f"{text} {start_remedy(error) or 'Pass --sampler transformers to the run.'}"
    finally:
        listening.close()
    return None


async def _announce(named: str, address: str) -> None:
    """Say where the server is, once it answers."""
    client = ServerClient(address, timeout=QUICK)
    while True:
        await asyncio.sleep(0.1)
        try:
            await asyncio.to_thread(client.call, "/is_paused")
            break
        except ServerFailed:
            continue
    print(
        f"serving {named} at {address}. Start the run by the same command without --serve, with\n"
        f"    --sampler vllm_server --sampler_url {address}\n"
        "Whoever reaches this address can read and replace the weights, and end the server: docs/security.md.",
        flush=True,
    )


async def _sample_once(client: Any) -> None:
    """Draw a token: what fails in a first request fails before anybody waits for it."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, seed=0, ignore_eos=True, logprobs=0, detokenize=False)
    try:
        async for _ in client.generate({"prompt_token_ids": [0]}, params, "trial"):
            pass
    except Exception as error:
        raise ValueError(
            f"vLLM cannot sample from this model: {first_line(error)}. Pass --sampler transformers to the run."
        ) from error
    await client.reset_prefix_cache()


def _launcher() -> Any:
    """VLLM's module with the parts of its API server; up to 0.28 it is another one."""
    try:
        import vllm.entrypoints.launchers.api_server.entry as launcher
    except ImportError:
        import vllm.entrypoints.openai.api_server as launcher
    return launcher


def _namespace(arguments: dict[str, Any], settings: ServerSettings) -> Namespace:
    """What vLLM's command line would give for these arguments of its engine."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers import cli_args
    except ImportError:  # up to 0.28
        from vllm.entrypoints.openai import cli_args

    args = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args([])
    server = {
        "host": settings.host,
        "port": settings.port,
        "served_model_name": ["policy"],
        "enable_scale_out": True,  # /inference/v1/generate; before 0.29 it is always there
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
    }
    vars(args).update(arguments | server)
    return args


if __name__ == "__main__":
    main()
