"""A server samples what an own engine samples, knows whose weights it has, and fails with a message."""

import http.server
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from common.check_model import CheckSettings
from common.cli import take_serve
from common.evaluation.settings import EvaluationSettings
from common.mistakes import WrongNumbers
from common.models.weights import policy_weights
from common.rollouts import Completion
from common.sampling import server_transfer
from common.sampling.protocol import Sampler, SamplingSettings
from common.sampling.server_client import ServerFailed, check_model, check_server, checked_url
from common.sampling.server_requests import requests
from common.sampling.vllm_sampler import VLLMSampler
from common.serve import server_settings
from common.start import start
from common.trainer import OnPolicyTrainer
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from tests.fixtures_server import LENGTHS, Server
from tests.forked import launch
from tests.test_lag import lagged
from tests.toy import algorithms, metrics_of, toy_config, toy_task, toy_trainer

ROOT = Path(__file__).parent.parent
PROMPTS = [[5, 7, 9, 11, 13 + i] for i in range(6)]
GREEDY = SamplingSettings(temperature=0.0, max_tokens=12, stop_token_ids=(3,))
SAMPLED = SamplingSettings(temperature=1.0, max_tokens=12, stop_token_ids=(3, 11, 19))
SEEDS = [1000 * i + 7 for i in range(len(PROMPTS))]


# ------------------------------------------------------------------------------------------------- the same samples


def as_own_engine(server: Sampler, own: Sampler) -> None:
    """Assert that two samplers draw the same: greedily, from seeds, and with top_p and top_k."""
    for settings, sampled in (
        (GREEDY, {}),
        (SAMPLED, {"num_generations": 4, "seeds": SEEDS}),
        (
            SamplingSettings(temperature=0.7, top_p=0.9, top_k=20, max_tokens=8, stop_token_ids=()),
            {"num_generations": 2, "seeds": SEEDS},
        ),
    ):
        ours, theirs = server.generate(PROMPTS, settings, **sampled), own.generate(PROMPTS, settings, **sampled)
        for one, other in zip(ours, theirs, strict=True):
            assert same_up_to_near_ties(one, other)


def same_up_to_near_ties(one: Completion, other: Completion) -> bool:
    """Whether log-probs agree to 1e-5, as far as the tokens are the same; two that are equally likely may swap."""
    same = 0
    while same < min(len(one.token_ids), len(other.token_ids)) and one.token_ids[same] == other.token_ids[same]:
        same += 1
    torch.testing.assert_close(
        torch.tensor(one.logprobs[:same]), torch.tensor(other.logprobs[:same]), atol=1e-5, rtol=0
    )
    if one.token_ids == other.token_ids:
        return one.truncated == other.truncated
    return abs(one.logprobs[same] - other.logprobs[same]) < 1e-5


@pytest.fixture(scope="module")
def own_run(server_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[OnPolicyTrainer, Path]:
    """Two steps of toy GRPO with an own engine."""
    folder = tmp_path_factory.mktemp("own") / "run"
    trainer = toy_trainer(server_folder, folder, sampler="vllm", eval_every=1, vllm_memory_share=0.05)
    trainer.train()
    return trainer, folder


@pytest.mark.slow
def test_the_server_samples_what_an_own_engine_samples_after_each_push(vllm_server, own_run, server_policy):
    own, server = own_run[0].policy_sampler.sampler, vllm_server.sampler()
    assert isinstance(own, VLLMSampler)
    before = None
    for _ in range(2):
        for sampler in (own, server):
            sampler.push(policy_weights(server_policy))
            sampler.wake()
        as_own_engine(server, own)
        greedy = [each.token_ids for each in server.generate(PROMPTS, GREEDY)]
        assert greedy != before
        before = greedy
        with torch.no_grad():
            for parameter in server_policy.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)


@pytest.mark.slow
def test_a_run_on_the_server_has_the_metrics_of_one_with_an_own_engine(vllm_server, own_run, tmp_path):
    on_server = {"sampler": "vllm_server", "sampler_url": vllm_server.url, "eval_every": 1}
    toy_trainer(vllm_server.model, tmp_path / "run", **on_server).train()
    compare(metrics_of(tmp_path / "run"), metrics_of(own_run[1]))


@pytest.mark.slow
def test_two_processes_on_one_server_have_the_metrics_of_one(vllm_server, own_run, tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.toy import toy_trainer; model, folder, url = sys.argv[1:];"
        "trainer = toy_trainer(Path(model), Path(folder), sampler='vllm_server', sampler_url=url, eval_every=1);"
        "trainer.train(); trainer.accelerator.state.destroy_process_group()"
    )
    (tmp_path / "two.py").write_text(script)
    launch(2, [tmp_path / "two.py", vllm_server.model, tmp_path / "run", vllm_server.url])
    compare(metrics_of(tmp_path / "run"), metrics_of(own_run[1]))


@pytest.mark.slow
def test_on_a_server_a_lag_has_the_metrics_that_it_has_with_an_own_engine(vllm_server, tmp_path):
    settings = {"eval_every": 2, "save_every": 1, "num_steps": 3}
    own = {"sampler": "vllm", "vllm_memory_share": 0.05}
    lagged(vllm_server.model, tmp_path / "own", **own, **settings).train()
    on_server = {"sampler": "vllm_server", "sampler_url": vllm_server.url}
    trainer = lagged(vllm_server.model, tmp_path / "server", **on_server, **settings)
    generate, threads = trainer.policy_sampler.sampler.generate, []

    def noted(*args: object, **request: object) -> list[Completion]:
        threads.append(threading.current_thread() is not threading.main_thread())
        return generate(*args, **request)

    trainer.policy_sampler.sampler.generate = noted
    trainer.train()
    assert threads == [False, True, True, True, False, False]  # evaluations are waited for
    lines = [metrics_of(tmp_path / name) for name in ("own", "server")]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, abs=1e-4), name


def compare(ours: list[dict], theirs: list[dict]) -> None:
    """Assert that two runs have the same metrics up to rounding."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, abs=1e-5), name


def test_each_completion_has_a_seed_of_its_own_however_many_the_server_takes_at_once():
    asked = requests([[5], [6]], SAMPLED, num_generations=5, seeds=[100, 200], most=2)
    params = [each.body["sampling_params"] for each in asked]
    assert [(each["seed"], each["n"]) for each in params] == [
        (100, 2),
        (102, 2),
        (104, 1),
        (200, 2),
        (202, 2),
        (204, 1),
    ]
    assert [(each.prompt, each.first) for each in asked] == [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4)]


@pytest.mark.slow
def test_more_completions_than_the_server_samples_at_once_are_those_of_their_seeds(vllm_server, server_policy):
    server = vllm_server.sampler()
    server.push(policy_weights(server_policy))
    num = 20  # it has memory for 16
    finished = []
    many = server.generate(
        PROMPTS[:1], SAMPLED, num_generations=num, seeds=[50], finished=lambda i, each: finished.append((i, len(each)))
    )
    assert finished == [(0, num)]
    [last] = server.generate(PROMPTS[:1], SAMPLED, seeds=[50 + num - 1])
    assert same_up_to_near_ties(many[-1], last)


# ------------------------------------------------------------------------------------------------------ whose weights


@pytest.mark.slow
def test_weights_of_somebody_else_are_not_sampled_from(vllm_server, server_policy):
    server, other = vllm_server.sampler(), vllm_server.sampler()
    assert not server.has_weights
    server.push(policy_weights(server_policy))
    assert server.has_weights
    other.push(policy_weights(server_policy))
    with pytest.raises(ServerFailed, match="not those that this run pushed: another run uses it too"):
        server.generate(PROMPTS, GREEDY)
    with pytest.raises(ServerFailed, match="A server belongs to one run"):
        server.has_weights  # noqa: B018
    with pytest.raises(ServerFailed, match="A server belongs to one run"):
        server.push(policy_weights(server_policy))
    assert other.has_weights and len(other.generate(PROMPTS, GREEDY)) == len(PROMPTS)


@pytest.mark.slow
def test_a_push_that_fails_leaves_a_server_that_takes_the_next_one(vllm_server, server_policy):
    server, weights = vllm_server.sampler(), list(policy_weights(server_policy))
    name, tensor = weights[3]

    def failing() -> Iterator:
        yield from weights[:3]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        server.push(failing())
    with pytest.raises(RuntimeError, match="generate before push"):
        server.generate(PROMPTS, GREEDY)
    with pytest.raises(WrongNumbers, match="NaN"):
        server.push([*weights[:3], (name, tensor.clone().fill_(torch.nan)), *weights[4:]])
    with pytest.raises(ServerFailed, match=r"push without 1 of \d+ weights"):
        server.push(weights[1:])
    with pytest.raises(ServerFailed, match="with shape"):
        server.push([*weights[:3], (name, tensor[:1]), *weights[4:]])
    vllm_server.client().call("/start_weight_update", {})  # of a trainer that was killed after it
    server.push(weights)
    assert server.has_weights and len(server.generate(PROMPTS, GREEDY)) == len(PROMPTS)


@pytest.mark.slow
def test_an_exception_ends_the_requests_on_the_server_too(vllm_server, server_policy):
    server = vllm_server.sampler()
    server.push(policy_weights(server_policy))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        server.generate(PROMPTS * 40, SAMPLED, num_generations=4, seeds=list(range(0, 2400, 10)), finished=fail)
    end = time.monotonic() + 30
    while running(vllm_server):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert len(server.generate(PROMPTS, GREEDY)) == len(PROMPTS)


def running(server: Server) -> float:
    """Requests that run or wait on the server."""
    from urllib.request import ProxyHandler, build_opener

    text = build_opener(ProxyHandler({})).open(server.url + "/metrics").read().decode()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(names))


# ------------------------------------------------------------------------------------------------------ what is there


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "sampler=vllm_server without sampler_url.*Pass --sampler_url http://127.0.0.1:8000"),
        ("127.0.0.1:8000", "need the scheme.*Pass --sampler_url http://127.0.0.1:8000"),
        ("localhost:8000", "need the scheme.*Pass --sampler_url http://localhost:8000"),
        ("ftp://127.0.0.1:8000", "need the scheme"),
        ("http://", "need the scheme"),
        ("http://127.0.0.1", "without a port it would be 80"),
        ("http://127.0.0.1:80000", "no number from 0 to 65535"),
        ("http://127.0.0.1:port", "no number from 0 to 65535"),
        ("", "need the scheme"),
    ],
)
def test_an_address_that_is_none_is_refused(url, message):
    with pytest.raises(ValueError, match=message):
        checked_url(url)


def test_an_address_may_end_in_a_slash():
    assert checked_url("http://127.0.0.1:8000/") == "http://127.0.0.1:8000"


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of something that listens and does `answer` with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def speak_another_language(connection: socket.socket) -> None:
    with connection, connection.makefile("rb") as request:
        while request.readline().strip():  # what is left unread when it is closed would reset the connection
            pass
        connection.sendall(b"220 mail.example.org ESMTP\r\n")


def hang_up(connection: socket.socket) -> None:
    with connection:
        connection.recv(100)


def test_what_is_no_server_is_said_before_anything_is_loaded(toy_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = toy_config(toy_folder, tmp_path / "run", sampler="vllm_server", sampler_url=f"http://127.0.0.1:{port}")
    with pytest.raises(ValueError, match=r"no server is there.*with --serve added"):
        algorithms()["GRPO"].trainer(config, task=toy_task())
    with listening(speak_another_language) as url, pytest.raises(ValueError, match="does not speak HTTP"):
        check_server(url, timeout=5)
    with listening(hang_up) as url, pytest.raises(ValueError, match="closed the connection"):
        check_server(url, timeout=5)
    with listening(lambda _: time.sleep(60)) as url, pytest.raises(ValueError, match="no answer to /x for 0 s"):
        check_server_quickly(url)


def check_server_quickly(url: str) -> None:
    from common.sampling.server_client import ServerClient

    ServerClient(url, timeout=1).call("/x", timeout=0.2)


def test_a_name_of_no_machine_is_said():
    with pytest.raises(ValueError, match="no machine of this name"):
        check_server("http://no-such-machine.invalid:8000", timeout=5)


class _Answers(http.server.BaseHTTPRequestHandler):
    """A web server with the answers of `routes`; everything else is not found."""

    routes: ClassVar[dict[str, tuple[int, str]]] = {}

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, text = self.routes.get(self.path, (404, '{"detail": "Not Found"}'))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def web_server(routes: dict[str, tuple[int, str]]) -> Iterator[str]:
    """The address of a web server with these answers."""
    handler = type("Handler", (_Answers,), {"routes": routes})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ABOUT = (
    '{"results": [{"model": "m", "digest": "0", "vocabulary": 8, "dtype": "float32", "max_model_len": 44, '
    '"max_num_seqs": 4, "logprobs_mode": "%s", "backend": %s, "world_size": 1, "started": "s"}]}'
)
GOOD = {
    "/collective_rpc": (200, ABOUT % ("processed_logprobs", '"gloo"')),
    "/weight_info": (200, '{"weight_version": "default"}'),
    "/is_paused": (200, '{"is_paused": false}'),
    "/inference/v1/generate": (405, '{"detail": "Method Not Allowed"}'),
}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"/collective_rpc": (404, "")}, "a vLLM without VLLM_SERVER_DEV_MODE=1, or another program"),
        ({"/collective_rpc": (500, '{"error": {"message": "no attribute"}}')}, "was not started by --serve"),
        ({"/collective_rpc": (200, "<html>")}, "gives no JSON"),
        ({"/collective_rpc": (200, '{"results": [{"model": "m"}]}')}, "another version of this project"),
        ({"/weight_info": (404, "")}, "older than vLLM 0.27"),
        ({"/is_paused": (404, "")}, "cannot wait until no request runs"),
        ({"/inference/v1/generate": (404, "")}, "without --enable-scale-out"),
        ({"/collective_rpc": (200, ABOUT % ("raw_logprobs", '"gloo"'))}, "its log-probs are raw_logprobs"),
        ({"/collective_rpc": (200, ABOUT % ("processed_logprobs", "null"))}, "without --weight-transfer-config"),
    ],
)
def test_a_server_that_lacks_something_is_refused_with_the_remedy(answers, message):
    with web_server(GOOD | answers) as url, pytest.raises(ServerFailed, match=message) as error:
        check_server(url, timeout=5)
    assert "--serve" in str(error.value)
    with web_server(GOOD) as url:
        check_server(url, timeout=5)


@pytest.mark.slow
def test_a_server_of_another_model_is_refused(vllm_server, server_folder, tmp_path):
    from tests.toy import save_toy_policy

    client, needs = vllm_server.client(), {"max_model_len": 44, "dtype": "float32"}
    check_model(client, str(server_folder), **needs)
    with pytest.raises(ValueError, match="other layers, shapes or constants than this run's"):
        check_model(client, str(save_toy_policy(tmp_path / "deeper", hidden_size=128, num_hidden_layers=3)), **needs)
    (tmp_path / "rope").mkdir()
    for file in server_folder.iterdir():
        text = file.read_bytes()
        if file.name == "config.json":
            text = text.replace(b'"rope_theta": 10000.0', b'"rope_theta": 5000.0')
        (tmp_path / "rope" / file.name).write_bytes(text)
    with pytest.raises(ValueError, match="other layers, shapes or constants"):
        check_model(client, str(tmp_path / "rope"), **needs)
    (tmp_path / "rope" / "config.json").write_bytes(
        (server_folder / "config.json").read_bytes().replace(b'"vocab_size": 459', b'"vocab_size": 460')
    )
    (tmp_path / "rope" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"with 459 tokens, this run's .* has 460"):
        check_model(client, str(tmp_path / "rope"), **needs)
    with pytest.raises(ValueError, match=r"of 44 tokens together; this run needs max_prompt_length \+ .* = 45"):
        check_model(client, str(server_folder), max_model_len=45, dtype="float32")
    with pytest.raises(ValueError, match="in float32, this run passes its policy in bfloat16"):
        check_model(client, str(server_folder), max_model_len=44, dtype="bfloat16")


def test_serve_is_one_program_and_plans_nothing(monkeypatch, capsys):
    script = Path(__file__).parents[1] / "GRPO" / "grpo.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--preset", "cpu", "--serve", "--plan"])
    monkeypatch.setattr("common.start.serve", lambda config: pytest.fail("a server was started"))
    with pytest.raises(SystemExit, match="2"):
        start(GRPOTrainer, GRPOConfig(), script=str(script))
    assert "error: --serve with --plan" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--serve in 2 processes.*by python in place of torchrun"):
        take_serve(["--serve"])


def test_serve_refuses_an_address_that_it_cannot_have(toy_folder, tmp_path):
    def settings(url: str) -> dict:
        return server_settings(toy_config(toy_folder, tmp_path / "run", sampler_url=url))

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="cannot listen there"):
        settings(f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(ValueError, match="the server itself speaks HTTP"):
        settings("https://127.0.0.1:8000")
    with pytest.raises(ValueError, match=r"cannot listen there.*another machine's"):
        settings("http://192.0.2.1:8000")
    with pytest.raises(ValueError, match="--serve now: it takes no value"):
        take_serve(["--serve", "now"])
    assert take_serve(["--seed", "1", "--serve", "--model", "m"]) == (True, ["--seed", "1", "--model", "m"])


def test_serve_names_packages_that_are_missing(toy_folder, tmp_path, monkeypatch):
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in ("uvicorn", "jmespath") else found(name))
    with pytest.raises(ValueError, match=r"uvicorn, jmespath are not installed.*make install"):
        server_settings(toy_config(toy_folder, tmp_path / "run"))


def test_the_server_has_the_lengths_of_the_run(toy_folder, tmp_path):
    config = toy_config(toy_folder, tmp_path / "run", prompts_per_step=8, num_generations=4, **LENGTHS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config.sampler_url = f"http://127.0.0.1:{port}"
    settings = server_settings(config)
    assert settings["engine"]["max_model_len"] == 44 and settings["engine"]["most_rows"] == 32
    assert (settings["host"], settings["port"], settings["engine"]["dtype"]) == ("127.0.0.1", port, "float32")


def test_commands_that_start_an_engine_themselves_say_so():
    for settings in (
        lambda: EvaluationSettings(model="m", task="countdown", sampler="vllm_server"),
        lambda: CheckSettings(model="m", sampler="vllm_server").as_run_settings(),
    ):
        with pytest.raises(ValueError, match=r"sampler=vllm_server: .*Pass --sampler vllm"):
            settings()


def test_weights_that_cannot_be_sent_to_the_end_are_known_on_the_other_side():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    received: list = []

    def worker() -> None:
        group = server_transfer.join("127.0.0.1", port, rank=1, world_size=2, timeout=20)
        for _ in range(2):
            try:
                received.append([(name, tensor.clone()) for name, tensor in server_transfer.receive(group)])
            except server_transfer.SenderFailed as error:
                received.append(error)

    thread = threading.Thread(target=worker, daemon=True)
    thread.start()
    group = server_transfer.join("127.0.0.1", port, rank=0, world_size=2, timeout=20)
    weights = [
        ("matrix", torch.arange(6, dtype=torch.bfloat16).view(2, 3).T),
        ("scalar", torch.tensor(4)),
        ("empty", torch.empty(0, 3)),
        ("mask", torch.tensor([True, False])),
    ]
    server_transfer.send(group, weights)
    with pytest.raises(ZeroDivisionError):
        server_transfer.send(group, ((name, tensor * (1 // (name != "scalar"))) for name, tensor in weights))
    thread.join(30)
    whole, failed = received
    assert [name for name, _ in whole] == [name for name, _ in weights]
    for (_, got), (_, sent) in zip(whole, weights, strict=True):
        assert got.dtype == sent.dtype and torch.equal(got, sent)
    assert isinstance(failed, server_transfer.SenderFailed)


# ---------------------------------------------------------------------------------------------- servers that go away


def engine_of(server: Server) -> int:
    """The process of the server's engine."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    [engine] = (pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return int(engine)


@pytest.mark.slow
def test_a_server_that_hangs_is_found_by_its_tokens(vllm_server, server_policy):
    server = vllm_server.sampler(timeout=2.0)
    server.push(policy_weights(server_policy))
    engine = engine_of(vllm_server)
    stop = threading.Timer(0.3, os.kill, (engine, signal.SIGSTOP))
    stop.start()
    try:
        with pytest.raises(ServerFailed, match=r"has made no token for 2 s|no answer to /weight_info for 2 s"):
            for _ in range(100):
                server.generate(PROMPTS * 8, SAMPLED, num_generations=4, seeds=list(range(0, 480, 10)))
    finally:
        stop.join()
        os.kill(engine, signal.SIGCONT)
    server = vllm_server.sampler()
    server.push(policy_weights(server_policy))
    assert server.generate(PROMPTS[:1], GREEDY)


@pytest.mark.slow
def test_a_server_that_ends_is_said_and_one_that_starts_again_gets_the_weights(vllm_server, server_policy):
    server = vllm_server.sampler()
    server.push(policy_weights(server_policy))
    before = server.generate(PROMPTS, GREEDY)
    end = threading.Timer(0.3, vllm_server.kill)
    end.start()
    with pytest.raises(ServerFailed, match=r"no server is there|closed the connection"):
        for _ in range(100):
            server.generate(PROMPTS * 8, SAMPLED, num_generations=4, seeds=list(range(0, 480, 10)))
    end.join()
    with pytest.raises(ServerFailed, match="no server is there"):
        vllm_server.sampler()
    vllm_server.start()
    assert not server.has_weights
    server.push(policy_weights(server_policy))
    assert server.has_weights
    assert [each.token_ids for each in server.generate(PROMPTS, GREEDY)] == [each.token_ids for each in before]
