"""What a sampler asks a server of vLLM by HTTP, other than completions: what it serves, and which weights it has.

vLLM's own client imports vllm, which takes seconds and is of no use to a trainer beside a server; and it answers with
tracebacks. Every call here has a time limit, and every failure is a message.
"""

import hashlib
import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedConfig

from common.mistakes import first_line
from common.models.configs import read_config
from common.models.weights import checkpoint_shapes

# Method of the server's workers that says what they are; only a server that --serve started has it.
ABOUT = "nanorlhf_about"
# Seconds for calls that need no work of the engine.
QUICK = 30.0
# Characters of the server's own words in a message.
_MAX_TEXT = 300
HOW_TO_START = (
    "Start one by the command of this run with --serve added, in another terminal or on other GPUs, and wait for its "
    'line "serving ..."'
)
# Keys of a configuration that say where it came from, and not what the model computes.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


class ServerFailed(ValueError):
    """The server does not do what a run needs of it; the message says what to do."""


class ServerRefused(ServerFailed):
    """The server answered with an error.

    Args:
        status: of HTTP.
        message: ours, with its own words.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model a policy is, whatever its weights are.

    Attributes:
        digest: of all that decides what it computes, and of the names and shapes of its weights.
        vocabulary: tokens that it has an embedding for.
    """

    digest: str
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]]) -> "ModelIdentity":
        """The identity of a model with this configuration, and weights of these shapes."""
        values = {name: value for name, value in config.to_diff_dict().items() if name not in _NOT_THE_MODEL}
        text = json.dumps([values, sorted((name, list(shape)) for name, shape in shapes.items())], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cls(digest=digest, vocabulary=config.get_text_config().vocab_size)


@dataclass(frozen=True, kw_only=True)
class About:
    """What a server says of itself.

    Attributes:
        model: as its user named it.
        digest: of ModelIdentity.
        vocabulary: tokens.
        dtype: of its forward passes, such as "bfloat16".
        max_model_len: tokens of the longest prompt and its completion.
        max_num_seqs: completions that it samples at the same time.
        logprobs_mode: what its log-probs are of.
        backend: how weights come to it; None: not at all.
        world_size: its processes with weights.
        started: different after each start.
    """

    model: str
    digest: str
    vocabulary: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    logprobs_mode: str
    backend: str | None
    world_size: int
    started: str


def checked_url(url: str | None) -> str:
    """The address of a server, without a slash at its end.

    Raises:
        ValueError: there is none, or it is no address.
    """
    example = "Pass --sampler_url http://127.0.0.1:8000"
    if url is None:
        raise ValueError(
            f"sampler=vllm_server without sampler_url: need the address of the server that samples. {example}, the "
            "one that --serve has if nothing else is said."
        )
    parts = urlsplit(url if "//" in url else f"//{url}")
    try:
        port = parts.port
    except ValueError:
        raise ValueError(f"sampler_url={url}: its port is no number from 0 to 65535. {example}.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        fixed = f"http://{parts.netloc or '127.0.0.1:8000'}"
        raise ValueError(
            f"sampler_url={url}: need the scheme, the machine and the port of the server. Pass --sampler_url {fixed}."
        )
    if port is None and parts.scheme == "http":
        raise ValueError(
            f"sampler_url={url}: without a port it would be 80, where no server of vLLM is. Pass --sampler_url "
            f"http://{parts.hostname}:8000."
        )
    return url.rstrip("/")


class ServerClient:
    """A server of vLLM at an address.

    Args:
        url: such as http://127.0.0.1:8000.
        timeout: seconds for what needs work of its engine.

    Raises:
        ValueError: it is no address.
    """

    def __init__(self, url: str | None, *, timeout: float) -> None:
        self.url, self.timeout = checked_url(url), timeout
        self._parts = urlsplit(self.url)

    def call(self, path: str, body: Any = None, *, timeout: float = QUICK) -> Any:
        """Ask the server and read its answer.

        Args:
            path: of the route, with its query.
            body: sent as JSON by POST; None: GET.
            timeout: seconds without any answer.

        Returns:
            The JSON of the answer; None if it is empty.

        Raises:
            ServerRefused: with the status of an error.
            ServerFailed: no server, or no answer.
        """
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname, self._parts.port, timeout=timeout)
        is_connected = False
        try:
            connection.connect()
            is_connected = True
            content = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", self._parts.path + path, content, headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self.no_answer(error, path, timeout=timeout, is_connected=is_connected) from error
        finally:
            connection.close()
        if status >= 400:
            raise self.refusal(status, path, text)
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise ServerFailed(
                f"sampler_url={self.url}: {path} gives no JSON, so no vLLM is there. {HOW_TO_START}."
            ) from None

    def no_answer(self, error: Exception, path: str, *, timeout: float, is_connected: bool) -> ServerFailed:
        """The error for a call that was not answered.

        Args:
            error: of the connection.
            path: that was asked for.
            timeout: seconds that it had.
            is_connected: something was there.
        """
        start = f"sampler_url={self.url}"
        if isinstance(error, socket.gaierror):
            return ServerFailed(f"{start}: there is no machine of this name. Check the address in --sampler_url.")
        if isinstance(error, TimeoutError):
            return ServerFailed(
                f"{start}: no answer to {path} for {timeout:.0f} s: the server hangs, or a firewall is between. Look "
                "at its output, end it, and start it again; then start this command again, which continues from the "
                "last checkpoint, if there is one."
            )
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
            return ServerFailed(f"{start}: what listens there does not speak HTTP. Check the port. {HOW_TO_START}.")
        if not is_connected:
            return ServerFailed(
                f"{start}: no server is there ({first_line(error)}): it was not started, has ended, or has another "
                f"port. {HOW_TO_START}; then start this command again, which continues from the last checkpoint, if "
                "there is one."
            )
        return ServerFailed(
            f"{start}: the server ended, or closed the connection, before it answered {path} ({first_line(error)}). "
            f"Its output says why. {HOW_TO_START}; then start this command again, which continues from the last "
            "checkpoint, if there is one."
        )

    def refusal(self, status: int, path: str, text: bytes) -> ServerRefused:
        """The error for an answer with a status of 400 or more."""
        try:
            answer = json.loads(text)
            said = answer.get("error", answer.get("detail", answer))
            said = str(said.get("message", said)) if isinstance(said, dict) else str(said)
        except (ValueError, AttributeError):
            said = text.decode(errors="replace")
        said = " ".join(said.split())[:_MAX_TEXT].rstrip(". ") or "no reason"
        return ServerRefused(status, f"sampler_url={self.url}: the server refuses {path} ({status}): {said}.")

    def about(self) -> About:
        """What the server is.

        Raises:
            ServerFailed: it is none that a run can sample from.
        """
        try:
            answer = self.call("/collective_rpc", {"method": ABOUT})
            about = About(**answer["results"][0])
        except ServerRefused as error:
            if error.status == 404:
                raise ServerFailed(
                    f"sampler_url={self.url}: what answers there takes no weights: it is a vLLM without "
                    f"VLLM_SERVER_DEV_MODE=1, or another program. {HOW_TO_START}."
                ) from None
            raise ServerFailed(
                f"sampler_url={self.url}: this vLLM was not started by --serve, so it lacks what makes its "
                f"completions those of the policy. {HOW_TO_START}."
            ) from None
        except (TypeError, KeyError, LookupError):
            raise ServerFailed(
                f"sampler_url={self.url}: this server was started by another version of this project. End it. "
                f"{HOW_TO_START}."
            ) from None
        return about

    def check_routes(self) -> None:
        """Refuse a server that lacks a route that runs need.

        Raises:
            ServerFailed: names the cause.
        """
        needs = {
            "/weight_info": "it is older than vLLM 0.27, and does not say which weights it has",
            "/is_paused": "it cannot wait until no request runs before new weights come",
        }
        for path, why in needs.items():
            try:
                self.call(path)
            except ServerRefused:
                raise ServerFailed(f"sampler_url={self.url}: there is no {path}: {why}. {HOW_TO_START}.") from None
        try:
            self.call("/inference/v1/generate")
        except ServerRefused as error:
            if error.status == 404:  # with the route, GET is not allowed
                raise ServerFailed(
                    f"sampler_url={self.url}: there is no /inference/v1/generate, which takes and gives token ids: "
                    f"this vLLM was started without --enable-scale-out. {HOW_TO_START}."
                ) from None

    def version(self) -> str:
        """The version of the weights that the server has, as whoever pushed them named it."""
        return str(self.call("/weight_info", timeout=self.timeout)["weight_version"])


def check_server(url: str | None, *, timeout: float) -> ServerClient:
    """Refuse an address at which no server samples for runs.

    Args:
        url: the setting sampler_url.
        timeout: seconds for what needs work of the engine.

    Raises:
        ValueError: with what is there, and what to do.
    """
    client = ServerClient(url, timeout=timeout)
    about = client.about()
    client.check_routes()
    if about.backend is None:
        raise ServerFailed(
            f"sampler_url={client.url}: this server was started without --weight-transfer-config, so no weights can "
            f"be pushed. {HOW_TO_START}."
        )
    if about.logprobs_mode != "processed_logprobs":
        raise ServerFailed(
            f"sampler_url={client.url}: its log-probs are {about.logprobs_mode}; a run needs processed_logprobs, "
            f"those after the temperature. {HOW_TO_START}."
        )
    return client


def check_model(
    client: ServerClient, model: str, *, max_model_len: int, dtype: str, trust_remote_code: bool = False
) -> About:
    """Refuse a server of another model, with other lengths, or in another precision.

    Args:
        client: from `check_server`.
        model: hub id or folder of the policy.
        max_model_len: tokens of the longest prompt and its completion.
        dtype: of the run's forward passes, such as "bfloat16".
        trust_remote_code: run Python files that come with the model.

    Raises:
        ValueError: what the server has, what the run needs, what to do.
    """
    about = client.about()
    config = read_config(model, trust_remote_code=trust_remote_code)
    identity = ModelIdentity.of(config, checkpoint_shapes(model, config))
    has = f"sampler_url={client.url}: the server has model={about.model}"
    other = f"End it. {HOW_TO_START}, or pass the --sampler_url of another one."
    if about.vocabulary != identity.vocabulary:
        raise ServerFailed(
            f"{has} with {about.vocabulary} tokens, this run's model={model} has {identity.vocabulary}. {other}"
        )
    if about.digest != identity.digest:
        raise ServerFailed(
            f"{has}, which has other layers, shapes or constants than this run's model={model}, so it would not "
            f"sample from the policy. {other}"
        )
    if about.max_model_len < max_model_len:
        raise ServerFailed(
            f"{has} for prompts and completions of {about.max_model_len} tokens together; this run needs max_prompt_"
            f"length + max_completion_length = {max_model_len}. {other}"
        )
    if about.dtype != dtype:
        raise ServerFailed(
            f"{has} in {about.dtype}, this run passes its policy in {dtype}: log-probs would differ by rounding. "
            f"{other}"
        )
    return about
