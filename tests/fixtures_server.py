"""A server of vLLM shared by the whole test session, started as its user starts it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.processes import end_with_parent
from common.sampling.server_client import ServerClient, check_model, check_server
from common.sampling.server_sampler import ServerSampler
from common.serve import missing_packages
from tests.toy import save_toy_policy

ROOT = Path(__file__).parent.parent
# Tokens of a prompt and its completion, as toy_config has them.
LENGTHS = {"max_prompt_length": 32, "max_completion_length": 12}


class Server:
    """A process of `--serve` for a model, at a free port.

    Attributes:
        model: folder of the policy.
        log: file with all that it prints.
        url: its address.
    """

    def __init__(self, model: Path, log: Path) -> None:
        self.model, self.log = model, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        settings = {"model": self.model, "preset": "none", "sampler_url": self.url, "vllm_memory_share": 0.05}
        settings |= {"prompts_per_step": 4, "num_generations": 4, "num_eval_prompts": 4, **LENGTHS}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "GRPO" / "grpo.py", *words, "--serve"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                start_new_session=True,
                preexec_fn=end_with_parent,  # also where the tests are killed
            )
        end = time.monotonic() + 300
        while "serving " not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """End it and its engine as a machine that fails would."""
        os.killpg(self.process.pid, 9)
        self.process.wait()

    def client(self, timeout: float = 60.0) -> ServerClient:
        """Asks it."""
        return check_server(self.url, timeout=timeout)

    def sampler(self, timeout: float = 60.0) -> ServerSampler:
        """A sampler on it, without weights."""
        client = self.client(timeout)
        needs = {"max_model_len": sum(LENGTHS.values()), "dtype": "float32"}
        return ServerSampler(client, check_model(client, str(self.model), **needs))


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy policy whose heads of 32 vLLM's attention on the CPU takes."""
    return save_toy_policy(tmp_path_factory.mktemp("served"), hidden_size=128)


@pytest.fixture(scope="session")
def vllm_server(server_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the toy policy; skipped where a package that it needs is missing."""
    pytest.importorskip("vllm")
    if missing := missing_packages():
        pytest.skip(f"not installed, but needed by vLLM's server: {', '.join(missing)}; run `make install`")
    server = Server(server_folder, tmp_path_factory.mktemp("server") / "log")
    yield server
    server.kill()


@pytest.fixture
def server_policy(server_folder: Path) -> torch.nn.Module:
    """The policy that the server has the model of."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(server_folder, dtype=torch.float32)
