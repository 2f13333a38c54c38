"""The sampler on a server: vLLM in processes of its own, which samples while the trainer's models are in use.

Weights come to it over a process group of their own, completions by HTTP, token ids in and out. A completion is drawn
from the same seed as in an own engine. Each push gives the weights a version that no other run has, and completions
are taken only from the version that was pushed last.
"""

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.config import RLConfig
from common.rollouts import Completion
from common.sampling.protocol import Finished, SamplingSettings, check_request
from common.sampling.pushing import Watched
from common.sampling.server_client import About, ServerClient, ServerFailed, check_model, check_server
from common.sampling.server_push import Transfer, connect, start
from common.sampling.server_requests import answers, requests
from common.sampling.vllm_engine import without_nan

logger = logging.getLogger("nanorlhf")

Answer = TypeVar("Answer")


def server_sampler(config: RLConfig, path: str, *, dtype: torch.dtype) -> "ServerSampler":
    """The sampler on the server at sampler_url.

    Args:
        config: sampler_url, lengths and process_timeout are read.
        path: folder or hub id of the policy.
        dtype: of forward passes.

    Raises:
        ValueError: no server that samples for runs is there, or it has another model.
    """
    client = check_server(config.sampler_url, timeout=60 * config.process_timeout)
    length = config.max_prompt_length + config.max_completion_length
    needed = {"max_model_len": length, "dtype": str(dtype).removeprefix("torch.")}
    about = check_model(client, path, trust_remote_code=config.trust_remote_code, **needed)
    return ServerSampler(client, about)


class ServerSampler:
    """A server that `--serve` started, with a copy of the weights that `push` replaces.

    With several processes, the main one sends the weights, and each asks for its own completions.

    Args:
        client: of the server, which was checked.
        about: what the server is.

    Attributes:
        samples_apart: True: it needs nothing of the trainer's devices, so that models may train meanwhile.
    """

    needs_push, samples_apart, resident_bytes = True, True, 0
    weights_dtype = None  # which of its matrices the server keeps in float32, it does not say

    def __init__(self, client: ServerClient, about: About) -> None:
        self._client, self._about = client, about
        self._run, self._number = uuid.uuid4().hex[:12], 0
        self._version: str | None = None  # that every process pushed last
        self._transfer: Transfer | None = None

    @property
    def has_weights(self) -> bool:
        """Whether the server has the weights of the last push; all processes must ask for it together.

        A server that was started again has none, and gets them by the next push, since no completion was drawn from
        others.

        Raises:
            ServerFailed: somebody else pushed weights.
        """
        return self._version is not None and _of_main_process(self._still_has_weights)

    def _still_has_weights(self) -> bool:
        """Whether the server has what was pushed last; a new one is noted."""
        if self._client.version() == f"{self._run}-{self._number}":
            return True
        about = self._client.about()
        if about.started == self._about.started:
            raise self._other_weights()
        if about.digest != self._about.digest or about.max_model_len < self._about.max_model_len:
            raise ServerFailed(
                f"sampler_url={self._client.url}: the server was started again meanwhile, with another model or "
                "shorter texts. End it, start it by the command of this run with --serve added, and start this "
                "command again, which continues from the last checkpoint, if there is one."
            )
        logger.warning("%s was started again: the policy's weights are sent once more", self._client.url)
        self._about, self._transfer = about, None
        return False

    def _other_weights(self) -> ServerFailed:
        return ServerFailed(
            f"sampler_url={self._client.url}: the server's weights are not those that this run pushed: another run "
            "uses it too, or it was started again while it sampled. A server belongs to one run: give the other one "
            "a server of its own, then start this command again, which continues from the last checkpoint, if there "
            "is one."
        )

    def generate(
        self,
        prompt_ids: list[list[int]],
        settings: SamplingSettings,
        *,
        num_generations: int = 1,
        seeds: list[int] | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        """See Sampler. It may run in a thread, but not beside `push`.

        Raises:
            ServerFailed: the server ended, hangs, or has other weights.
        """
        check_request(prompt_ids, settings, num_generations, seeds)
        longest, limit = max(map(len, prompt_ids), default=0), self._about.max_model_len
        if longest + settings.max_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens with max_tokens={settings.max_tokens}: the server was started for "
                f"max_model_len={limit} tokens in total. Drop longer prompts, or raise max_prompt_length."
            )
        if self._version is None:
            raise RuntimeError("generate before push: the server has no weights of the policy. Call push first.")
        self._check_version()
        drawn: list[dict[int, Completion]] = [{} for _ in prompt_ids]
        shared = {"num_generations": num_generations, "seeds": seeds, "most": self._about.max_num_seqs}
        with closing(answers(self._client, requests(prompt_ids, settings, **shared))) as come:
            for request, answer in come:
                of_prompt = drawn[request.prompt]
                of_prompt |= enumerate(self._completions(answer), start=request.first)
                if finished is not None and len(of_prompt) == num_generations:
                    finished(request.prompt, [of_prompt[i] for i in range(num_generations)])
        self._check_version()
        return [of_prompt[i] for of_prompt in drawn for i in range(num_generations)]

    def _check_version(self) -> None:
        if self._client.version() != self._version:
            raise self._other_weights()

    def _completions(self, answer: dict[str, Any]) -> list[Completion]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
            raise ServerFailed(
                f"sampler_url={self._client.url}: completions were aborted on the server: another program paused it "
                "or ended its requests. A server belongs to one run. Start this command again, which continues from "
                "the last checkpoint, if there is one."
            )
        return [
            Completion(
                choice["token_ids"],
                [token["logprob"] for token in choice["logprobs"]["content"]],
                choice["finish_reason"] == "length",
            )
            for choice in choices
        ]

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Sampler. All processes together: each makes every tensor, and the main one sends it.

        Raises:
            ServerFailed: on all processes, if the server did not get all weights.
            WrongNumbers: a weight is NaN.
        """
        self._version, version = None, f"{self._run}-{self._number + 1}"
        stream, problem = Watched(without_nan(weights)), None
        try:
            if _is_main_process():
                try:
                    self._push(stream, version)
                except ServerFailed as error:
                    problem = str(error)
                except Exception as error:
                    if stream.is_broken:  # all processes raise it, or wait for a tensor until this one has ended
                        raise
                    problem = f"push of the policy's weights: the main process could not send them: {error!r}."
                    logger.exception("%s", problem)
            for _ in stream:  # what is made of all processes' parts, all must make
                pass
            version = _of_main_process(lambda: _said(version, problem))
        except BaseException:
            self._transfer = None  # the server's end is closed
            raise
        self._version, self._number = version, self._number + 1

    def _push(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        client, slow = self._client, self._client.timeout
        if self._transfer is not None:
            self._still_has_weights()
        if self._transfer is None:
            self._transfer = connect(client, self._about)
        client.call("/pause?mode=wait", {}, timeout=slow)
        try:
            start(client)
            self._transfer.send(weights)
            client.call("/finish_weight_update", {"weight_version": version}, timeout=slow)
            # Cache blocks are found by their tokens: without this, prompts would reuse blocks of the old weights.
            if not client.call("/reset_prefix_cache", {}, timeout=slow)["success"]:
                raise ServerFailed(f"sampler_url={client.url}: the server's cache cannot be emptied: requests run.")
        except BaseException:
            with suppress(ServerFailed):  # which would hide what went wrong
                client.call("/resume", {})
            raise
        client.call("/resume", {}, timeout=slow)
        self._check_new(version)

    def _check_new(self, version: str) -> None:
        has = self._client.version()
        if has != version:
            raise ServerFailed(
                f"sampler_url={self._client.url}: after the push of version {version} the server has version {has}: "
                "another run pushes to it too. A server belongs to one run: give the other one its own."
            )

    def sleep(self) -> None:
        """See Sampler. The server has devices of its own, so there is nothing to free."""

    def wake(self) -> None:
        """See Sampler. It never sleeps."""


def _said(version: str, problem: str | None) -> str:
    """The version that was pushed, if there was no problem."""
    if problem is not None:
        raise ServerFailed(problem)
    return version


def _num_processes() -> int:
    is_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_group else 1


def _is_main_process() -> bool:
    return _num_processes() == 1 or torch.distributed.get_rank() == 0


def _of_main_process(ask: Callable[[], Answer]) -> Answer:
    """What the main process finds, on all processes; a ServerFailed of it is raised by all."""
    if _num_processes() == 1:
        return ask()
    found: list[Any] = [None, None]
    if _is_main_process():
        try:
            found[0] = ask()
        except ServerFailed as error:
            found[1] = str(error)
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise ServerFailed(found[1])
    return found[0]
