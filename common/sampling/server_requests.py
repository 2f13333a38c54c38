"""Completions from a server: many requests at a time, each answered whole, and what happens if it stops answering."""

import asyncio
import json
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Thread
from typing import Any

from common.sampling.protocol import SamplingSettings
from common.sampling.server_client import QUICK, ServerClient, ServerFailed

# Requests that are open at a time: more than a server samples at once, and fewer than files that may be open.
_MOST_REQUESTS = 256
# Seconds between looks at whether the server still makes tokens.
_LOOK_EVERY = 5.0
# Seconds for a connection.
_CONNECT = 30.0
_COUNTERS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Some completions of one prompt.

    Attributes:
        prompt: its position.
        first: the number of the first of these completions, among all of the prompt.
        body: what the server gets.
    """

    prompt: int
    first: int
    body: dict[str, Any]


def requests(
    prompt_ids: list[list[int]],
    settings: SamplingSettings,
    *,
    num_generations: int,
    seeds: list[int] | None,
    most: int,
) -> list[Request]:
    """What to ask for: completion i of a prompt has the seed of the prompt plus i, in whatever request it is.

    Args:
        prompt_ids: token ids of each prompt.
        settings: for all prompts.
        num_generations: completions per prompt.
        seeds: one per prompt; None if greedy.
        most: completions that the server takes in one request.
    """
    shared = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_tokens": settings.max_tokens,
        "stop_token_ids": list(settings.stop_token_ids),
        "ignore_eos": True,  # stop_token_ids is the one list of end tokens
        "logprobs": 0,  # of the sampled token only
        "detokenize": False,
    }
    found = []
    for prompt, ids in enumerate(prompt_ids):
        for first in range(0, num_generations, most):
            own = {"n": min(most, num_generations - first), "seed": None if seeds is None else seeds[prompt] + first}
            found.append(Request(prompt=prompt, first=first, body={"token_ids": ids, "sampling_params": shared | own}))
    return found


def answers(client: ServerClient, asked: list[Request]) -> Iterator[tuple[Request, dict[str, Any]]]:
    """The server's answers, in the order in which they come; an exception here ends all requests on the server too.

    The connections live in a thread with an event loop, since the caller's thread may have one that runs.

    Args:
        client: of the server.
        asked: all of them at once.

    Raises:
        ServerFailed: the server ended, refuses a request, or makes no tokens.
    """
    loop, come = asyncio.new_event_loop(), queue.SimpleQueue()
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    work = asyncio.run_coroutine_threadsafe(_ask(client, asked, come.put), loop)
    work.add_done_callback(lambda _: come.put(None))
    try:
        while (answer := come.get()) is not None:
            yield answer
        work.result()
    finally:
        work.cancel()
        asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end_tasks() -> None:
    """Cancel what still runs, and wait until its connections are closed: the server then drops their requests."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _ask(client: ServerClient, asked: list[Request], put: Callable[[Any], None]) -> None:
    import aiohttp

    # A completion takes as long as it takes: what waits in vain is found by `_watch`.
    limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT)
    connector = aiohttp.TCPConnector(limit=_MOST_REQUESTS)
    async with aiohttp.ClientSession(timeout=limits, connector=connector) as session:

        async def ask(request: Request) -> None:
            path = "/inference/v1/generate"
            try:
                async with session.post(client.url + path, json=request.body) as response:
                    text = await response.read()
            except (aiohttp.ClientError, OSError) as error:
                is_connected = not isinstance(error, aiohttp.ClientConnectorError)
                raise client.no_answer(error, path, timeout=_CONNECT, is_connected=is_connected) from error
            if response.status >= 400:
                raise client.refusal(response.status, path, text)
            put((request, json.loads(text)))

        watch = asyncio.create_task(_watch(client))
        work = asyncio.gather(*map(ask, asked))
        try:
            done, _ = await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            watch.cancel()
            work.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


async def _watch(client: ServerClient) -> None:
    """Raise if the server makes no token for its time limit: its count of tokens is asked for, over and over."""
    import aiohttp

    counted, since = -1.0, time.monotonic()
    limits = aiohttp.ClientTimeout(total=QUICK)
    async with aiohttp.ClientSession(timeout=limits) as session:
        while True:
            await asyncio.sleep(min(_LOOK_EVERY, client.timeout / 4))
            try:
                async with session.get(client.url + "/metrics") as response:
                    now = _num_tokens(await response.text())
            except (aiohttp.ClientError, OSError, TimeoutError):  # the requests find out what it is
                now = counted
            if now != counted:
                counted, since = now, time.monotonic()
            elif time.monotonic() - since > client.timeout:
                raise ServerFailed(
                    f"sampler_url={client.url}: the server has made no token for {client.timeout:.0f} s "
                    "(process_timeout), so it hangs, or another program has paused it. Look at its output, end it, "
                    "and start it again; then start this command again, which continues from the last checkpoint, if "
                    "there is one."
                )


def _num_tokens(metrics: str) -> float:
    """All tokens that a server has read and made, from its metrics in Prometheus' form."""
    lines = (line for line in metrics.splitlines() if line.startswith(_COUNTERS))
    return sum(float(line.rpartition(" ")[2]) for line in lines)
