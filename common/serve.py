"""Starts the server of sampler=vllm_server: `python GRPO/grpo.py <the settings of the run> --serve`.

The server has the model, the lengths and the precision of the run, because it has the run's own settings. This process
becomes the server, so that signals and the exit status are those of the server.
"""

import importlib.util
import json
import os
import re
import socket
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch

from common.config import AUTO, RLConfig
from common.embedded import check_model, resolve_model, skeleton
from common.models.loading import compute_dtype
from common.models.positions import check_room
from common.sampling.policy_sampler import largest_request
from common.sampling.server_client import checked_url
from common.sampling.vllm_engine import check_installed, few_weights
from common.sampling.vllm_startup import EngineSettings

DEFAULT_URL = "http://127.0.0.1:8000"
# Modules that vLLM's server imports, and a lean vLLM comes without.
_MODULES = {
    "uvicorn": "uvicorn",
    "httptools": "httptools",
    "h11": "h11",
    "watchfiles": "watchfiles",
    "websockets": "websockets",
    "python_multipart": "python-multipart",
    "prometheus_fastapi_instrumentator": "prometheus-fastapi-instrumentator",
    "sse_starlette": "sse-starlette",
    "model_hosting_container_standards": "model-hosting-container-standards",
    "jmespath": "jmespath",
    "supervisor": "supervisor",
}
# The oldest vLLM with /weight_info.
_OLDEST = (0, 27)
# Shares of memory if the settings leave them open: the server has a GPU to itself, and no CPU.
_SHARE_OF_GPU, _SHARE_OF_CPU = 0.9, 0.4


def serve(config: RLConfig) -> NoReturn:
    """Become the server of a run.

    Args:
        config: the run's settings; the server listens at sampler_url, or DEFAULT_URL.

    Raises:
        ValueError: something is missing, the model cannot be served, or the address is taken; before anything loads.
    """
    settings = server_settings(config)
    model = settings["engine"]["model"]
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",  # without it, no weights can be pushed
        # Else vLLM takes other cores than those that the shell, or torch, has given.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # after a look at the GPUs, a forked process could not use them
        # vLLM and torch warn of each other, in each of the server's processes.
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
    }
    if not torch.cuda.is_available() and few_weights(each.numel() for each in skeleton(model).parameters()):
        environment["OMP_NUM_THREADS"] = "1"
    print(f"starting a server for {config.model}; this takes up to a minute, and longer for large models", flush=True)
    arguments = [sys.executable, "-m", "common.sampling.vllm_server", json.dumps(settings)]
    sys.stderr.flush()
    os.execve(sys.executable, arguments, environment)


def server_settings(config: RLConfig) -> dict[str, Any]:
    """Settings of the server that serves a run, as fields of ServerSettings.

    Args:
        config: the run's.

    Raises:
        ValueError: see `serve`.
    """
    check_installed()
    _check_packages()
    parts = urlsplit(checked_url(config.sampler_url or DEFAULT_URL))
    if parts.scheme == "https" or parts.path:
        raise ValueError(
            f"sampler_url={config.sampler_url} with --serve: the server itself speaks HTTP, and has no path. Pass "
            f"--sampler_url http://{parts.hostname}:8000 here, and to the run the address of what is in front of it."
        )
    _check_address(parts.hostname, parts.port)
    check_model(config.model, trust_remote_code=config.trust_remote_code, attention=config.attn_implementation)
    check_room(skeleton(config.model), config)
    is_gpu = torch.cuda.is_available()
    share = config.vllm_memory_share
    num_held_out = config.num_eval_prompts if config.eval_every else 0
    engine = EngineSettings(
        model=resolve_model(config.model),
        dtype=str(compute_dtype(config, torch.device("cuda" if is_gpu else "cpu"))).removeprefix("torch."),
        max_model_len=config.max_prompt_length + config.max_completion_length,
        max_num_seqs=config.vllm_max_num_seqs,
        most_rows=largest_request(config, num_held_out, 1),
        memory_share=(_SHARE_OF_GPU if is_gpu else _SHARE_OF_CPU) if share == AUTO else share,
        enforce_eager=config.vllm_enforce_eager,
        trust_remote_code=config.trust_remote_code,
    )
    return {
        "engine": asdict(engine),
        "named": config.model,
        "host": parts.hostname,
        "port": parts.port,
        "tensor_parallel": config.vllm_tensor_parallel,
    }


def missing_packages() -> list[str]:
    """Packages that the server needs and that are not installed."""
    return [package for module, package in _MODULES.items() if importlib.util.find_spec(module) is None]


def _check_packages() -> None:
    if missing := missing_packages():
        raise ValueError(
            f"--serve, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: vLLM's server "
            "imports them. Run `make install`."
        )
    found = _version_of_vllm()
    if found is not None and found < _OLDEST:
        raise ValueError(
            f"--serve with vLLM {'.'.join(map(str, found))}: its server does not say which weights it has, so a run "
            "could not tell whether completions are its policy's. Run `make install`, or install vLLM 0.27 or newer."
        )


def _version_of_vllm() -> tuple[int, ...] | None:
    for package in ("vllm", "vllm-cpu"):
        try:
            return tuple(map(int, re.findall(r"\d+", version(package))[:2]))
        except PackageNotFoundError:
            continue
    return None  # built from source, under another name


def _check_address(host: str, port: int) -> None:
    """Refuse an address that is another program's or another machine's."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ValueError(
            f"sampler_url=http://{host}:{port}: this machine cannot listen there ({error.strerror or error}): another "
            "program has the port, or the address is another machine's. Pass --sampler_url with a free port, such as "
            f"http://127.0.0.1:{port + 1}, to the server and to the run."
        ) from None
