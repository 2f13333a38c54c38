"""Seconds of a step, computed from its tokens, the plan's bytes and the card's rates: nothing here was measured.

Every phase has the name of the stopwatch's (metrics.jsonl, time/...), so that a run can be laid beside it. Left out:
rules, which run on the processors, checkpoints, evaluation, and starting up.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import math
from dataclasses import dataclass, replace

from common.config import RLConfig
from common.memory import constants
from common.memory.cards import Rates
from common.memory.plan import GB, Plan
from common.memory.show import is_spread
from common.memory.tenants import BYTES_IN_4_BIT, FLOAT32, Sizes, Tenant
from common.models.configs import setting
from common.sequences import WORTH_IT, Packing

TERA = 1e12
# That a step of AdamW reads and writes for each weight: weight, both moments, and the gradient, which is read alone.
_BYTES_OF_ADAMW = 28


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What is sampled at once.

    Attributes:
        prompts: groups.
        generations: completions of each prompt.
        prompt: tokens of a prompt, in the mean.
        completion: tokens of a completion, in the mean.
        longest: tokens of the longest completion.
    """

    prompts: int
    generations: int
    prompt: float
    completion: float
    longest: int

    @property
    def rows(self) -> int:
        """Completions."""
        return self.prompts * self.generations

    def part(self, count: int) -> Tokens:
        """What each of so many has that share the prompts."""
        return replace(self, prompts=math.ceil(self.prompts / count))

    @property
    def sampled(self) -> float:
        """Tokens of all completions."""
        return self.rows * self.completion

    @property
    def context(self) -> float:
        """Tokens that a sampled token sees, in the mean; lengths are spread as if each token might be the last."""
        return self.prompt + min(2 * self.completion, self.longest) / 2


@dataclass(frozen=True, kw_only=True)
class Part:
    """A phase of a step.

    Attributes:
        seconds: that it takes.
        how: the arithmetic in words.
    """

    seconds: float
    how: str


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations of a model for each token, forwards.

    Attributes:
        body: of all layers but the head.
        head: of the head, for a token that is predicted.
        attention: for each token that is seen.
    """

    body: float
    head: float
    attention: float

    @classmethod
    def of(cls, sizes: Sizes) -> Operations:
        """By a model's parameters: two operations for each, and four for each feature of a seen token and layer."""
        text = sizes.config.get_text_config()
        heads, size = setting(text, "num_attention_heads"), setting(text, "head_dim")
        width = heads * (size or setting(text, "hidden_size") // heads)
        return cls(
            body=2 * (sizes.parameters - sizes.embedding - sizes.head),
            head=2 * (sizes.head or sizes.embedding),
            attention=4 * setting(text, "num_hidden_layers") * width,
        )

    def forward(self, tokens: float, predicted: float, context: float) -> float:
        """Operations of a forward pass.

        Args:
            tokens: that go through the layers.
            predicted: of these, whose successor is asked for.
            context: tokens that each of them sees, in the mean.
        """
        return tokens * (self.body + context * self.attention) + predicted * self.head


@dataclass(frozen=True, kw_only=True)
class Links:
    """The way between a run's processes.

    Attributes:
        processes: that a tensor is gathered from, or a gradient is summed over.
        rate: bytes/s that each of them gets.
        latency: seconds that an operation takes whatever its size.
    """

    processes: int
    rate: float
    latency: float

    @classmethod
    def of(cls, plan: Plan, rates: Rates) -> Links:
        """Between all processes: of the slower of the links within a machine and those that leave it, together.

        Raises:
            ValueError: the links of such cards are not known.
        """
        together = plan.processes // plan.nodes
        rate = rates.peers * constants.PEERS if together > 1 else math.inf
        if plan.nodes > 1:
            rate = min(rate, together * rates.network * constants.NETWORK)
        if plan.processes > 1 and not rate:
            raise ValueError(
                f"{plan.card.name}: the links between several such cards are not known here, and times on "
                f"{plan.processes} processes cannot be computed without them. Name an A100, H100 or H200."
            )
        latency = constants.OPERATION + (plan.nodes - 1) * constants.OPERATION_OF_NODE
        return cls(processes=plan.processes, rate=rate, latency=latency)

    def seconds(self, size: float, operations: int) -> float:
        """To gather tensors of `size` bytes in all, or to spread their sum, in so many operations."""
        if self.processes == 1:
            return 0.0
        return size * (self.processes - 1) / self.processes / self.rate + operations * self.latency


def step_seconds(config: RLConfig, plan: Plan, rates: Rates, tokens: Tokens) -> dict[str, Part]:
    """The phases of a step, on one card or on several that do the same at the same time.

    Args:
        config: the run's settings, with vLLM as its sampler.
        plan: of the run; it fits.
        rates: of the card.
        tokens: that a step samples, over all processes.

    Raises:
        ValueError: there are several processes, and the links between such cards are not known.
    """
    scores = [each for each in plan.cast.models if each.passes.kind == "score"]
    links, own = Links.of(plan, rates), tokens.part(plan.processes)
    parts = {
        "sample": sampling(config, plan, rates, tokens),
        "score": _scoring(scores, rates, own),
        "logprobs": _logprobs(config, plan, rates, own, links),
        "update": _update(config, plan, rates, own, links),
        "push": _push(config, plan, rates, links),
        "offload": _offload(config, plan, rates, scores),
    }
    return {name: part for name, part in parts.items() if part.seconds}


def sampling(config: RLConfig, plan: Plan, rates: Rates, tokens: Tokens) -> Part:
    """Prompts are read once for their group; then each round gives every running completion one token.

    A round reads all weights, and the cache of what runs. With room for fewer than all completions, those that wait
    start as others end: no more rounds than all tokens divided by the places, and the longest completion once more.
    Processes that share an engine have a part of all of that each, and add up what each layer gives, twice.

    Args:
        config: the run's settings, with vLLM as its sampler.
        plan: of the run; it fits.
        rates: of the card.
        tokens: that are sampled, over all processes.
    """
    engine, operations = plan.cast.engine, Operations.of(plan.cast.sizes)
    parts = config.vllm_tensor_parallel
    tokens = tokens.part(plan.processes // parts)
    row = config.max_prompt_length + config.max_completion_length
    of_token = engine.sequence / row
    room = math.floor(plan.sequences * row / (tokens.prompt + tokens.completion))
    places = max(min(config.vllm_max_num_seqs, tokens.rows, room), 1)
    longest = min(tokens.longest, config.max_completion_length)
    rounds = math.ceil(
        min(math.ceil(tokens.rows / places) * longest, tokens.sampled / places + longest)
        if tokens.rows > places
        else longest
    )
    weights, cache = rounds * engine.weights, tokens.sampled * tokens.context * of_token
    reading = (weights + cache) / (rates.bandwidth * constants.DECODING_BANDWIDTH)
    speed = rates.flops * constants.SAMPLING_FLOPS
    computing = operations.forward(tokens.sampled, tokens.sampled, tokens.context) / speed / parts
    prompts = tokens.prompts * tokens.prompt
    prefill = operations.forward(prompts, tokens.prompts, tokens.prompt / 2) / speed / parts
    waiting = rounds * constants.DECODING_ROUND
    adding = _adding_up(plan, rates, parts, rounds, tokens.sampled + prompts) if parts > 1 else 0.0
    bound = "memory" if reading >= computing else "FLOPS"
    how = (
        f"{rounds:,} rounds of {places} completions. Read: {rounds:,} x {engine.weights / GB:.2f} GB of weights + "
        f"{cache / GB:,.0f} GB of cache ({tokens.sampled:,.0f} tokens x {tokens.context:,.0f} seen x "
        f"{of_token / 1e3:.1f} kB) in {reading:.1f} s. Compute: {computing:.1f} s; bound by {bound}. "
        f"{prompts:,.0f} tokens of prompts: {prefill:.1f} s. Rounds: {waiting:.1f} s"
    )
    if parts > 1:
        how += f". Sums over {parts} cards: {adding:.1f} s"
    return Part(seconds=max(reading, computing) + prefill + waiting + adding, how=how)


def _adding_up(plan: Plan, rates: Rates, parts: int, rounds: int, tokens: float) -> float:
    """Seconds of the sums over the cards of an engine: two in each layer, of a number for each feature and token."""
    text = plan.cast.sizes.config.get_text_config()
    layers = setting(text, "num_hidden_layers")
    size = 2 * layers * tokens * setting(text, "hidden_size") * plan.cast.policy.passes.compute.itemsize
    # A sum is spread and gathered again.
    moving = 2 * size * (parts - 1) / parts / (rates.peers * constants.PEERS)
    return moving + 2 * layers * rounds * constants.OPERATION


def tokens_of_passes(plan: Plan, tokens: Tokens) -> float:
    """Tokens that go through the layers: with packed rows a prompt counts once for its group, where that pays."""
    width = setting(plan.cast.sizes.config.get_text_config(), "hidden_size")
    packing = Packing(max_tokens=math.inf, hidden_size=width)
    row = tokens.prompt + tokens.completion
    packed, cost = packing.of_group(round(tokens.prompt), [round(tokens.completion)] * tokens.generations)
    pays = cost < WORTH_IT * tokens.generations * packing.cost(row, row)
    return tokens.prompts * packed if pays else tokens.rows * row


def _passes(plan: Plan, tokens: Tokens) -> tuple[float, float, int]:
    """Tokens, operations of one forward pass over all rows, and micro-batches."""
    through = tokens_of_passes(plan, tokens)
    forward = Operations.of(plan.cast.sizes).forward(through, tokens.sampled, (tokens.prompt + tokens.completion) / 2)
    return through, forward, math.ceil(through / plan.choices.max_tokens_per_microbatch)


def _unpacking(plan: Plan, rates: Rates, passes: float) -> float:
    """Seconds to unpack linear layers in 4 bits for so many passes: they are read, and written in 16 bits."""
    return passes * plan.cast.sizes.packed * (BYTES_IN_4_BIT + 2) / rates.bandwidth


def _gathering(config: RLConfig, plan: Plan, links: Links, passes: float, *, trains: bool) -> tuple[float, str]:
    """Seconds in which the weights come for so many passes of the policy, and gradients leave, and that in words.

    For a pass with a gradient they come twice, forwards and backwards.
    """
    if not is_spread(plan, config):
        return 0.0, ""
    sizes, width = plan.cast.sizes, plan.cast.policy.passes.compute.itemsize
    adapter = sum(sizes.adapter) if config.use_lora else 0
    size, times = width * (sizes.parameters + adapter), 2 if trains else 1
    moved, operations = passes * times * size, passes * times * _layers(plan)
    words = f"{passes:.0f} x {times} x {size / GB:.2f} GB of weights"
    if trains:
        gradients = FLOAT32 * (adapter or sizes.parameters)
        moved, operations = moved + passes * gradients, operations + passes * _layers(plan)
        words += f" and {gradients / GB:.2f} GB of gradients"
    seconds = links.seconds(moved, operations)
    return seconds, f". {words} between {plan.processes} cards, meanwhile: {seconds:.1f} s"


def _layers(plan: Plan) -> int:
    """What is gathered at a time, and what is in no layer."""
    return setting(plan.cast.sizes.config.get_text_config(), "num_hidden_layers") + 1


def _logprobs(config: RLConfig, plan: Plan, rates: Rates, tokens: Tokens, links: Links) -> Part:
    asked = [each for each in plan.cast.models if each.name == "ref" and config.kl_coef]
    if config.makes_old_logprobs or (config.kl_coef and vars(config).get("kl_place") == "reward"):
        asked.append(plan.cast.policy)
    through, forward, batches = _passes(plan, tokens)
    speed = rates.flops * constants.PASS_FLOPS
    seconds = len(asked) * forward / speed
    how = f"{len(asked)} x {through:,.0f} tokens forwards, {forward / TERA:,.0f} TFLOP: {seconds:.1f} s"
    if config.load_in_4bit:
        unpacking = _unpacking(plan, rates, len(asked) * batches)
        how += f". Unpacking 4 bits: {unpacking:.1f} s"
        seconds += unpacking
    moving, words = _gathering(config, plan, links, len(asked) * batches, trains=False)
    return Part(seconds=max(seconds, moving), how=how + words)


def _update(config: RLConfig, plan: Plan, rates: Rates, tokens: Tokens, links: Links) -> Part:
    sizes = plan.cast.sizes
    through, forward, batches = _passes(plan, tokens)
    again = 1 if config.gradient_checkpointing else 0
    adapter = sum(sizes.adapter) if config.use_lora else 0
    # Backwards, activations cost a forward pass, and so do the gradients of all weights that are trained.
    times = 1 + again + (1 if config.use_lora else 2)
    work = times * forward + (3 + again) * 2 * adapter * through
    epochs = config.num_update_epochs
    seconds = epochs * work / (rates.flops * constants.PASS_FLOPS)
    how = f"{through:,.0f} tokens x {times} passes ({forward / TERA:,.0f} TFLOP each"
    how += f", the adapter besides): {seconds:.1f} s" if adapter else f"): {seconds:.1f} s"
    if config.load_in_4bit:
        unpacking = _unpacking(plan, rates, epochs * batches * (2 + again))
        how += f". Unpacking 4 bits for {batches} micro-batches: {unpacking:.1f} s"
        seconds += unpacking
    steps, trained = epochs * config.num_minibatches, adapter or sizes.parameters
    moving, words = _gathering(config, plan, links, max(epochs * batches, steps), trains=True)
    seconds, how = max(seconds, moving), how + words
    if plan.processes > 1 and not moving:
        summing = links.seconds(2 * steps * FLOAT32 * trained, 2 * steps)
        how += f". Sums of gradients over {plan.processes} cards: {summing:.2f} s"
        seconds += summing
    own = trained / (plan.processes if moving else 1)
    if config.optimizer == "adamw_host":
        moved = (epochs * batches + steps) * 2 * own / rates.link
        stepping = steps * _BYTES_OF_ADAMW * own / constants.HOST_BANDWIDTH
        how += f". {batches} times gradients out, and weights back: {moved:.1f} s. AdamW on the host: {stepping:.1f} s"
        return Part(seconds=seconds + moved + stepping, how=how)
    stepping = steps * _BYTES_OF_ADAMW * own / rates.bandwidth
    return Part(seconds=seconds + stepping, how=f"{how}. AdamW: {stepping:.2f} s")


def _scoring(models: list[Tenant], rates: Rates, tokens: Tokens) -> Part:
    """Reward models, each in the precision of its weights."""
    seconds, parts, read = 0.0, [], tokens.rows * (tokens.prompt + tokens.completion)
    for model in models:
        width = model.passes.weights.itemsize
        text = model.config.get_text_config()
        count = sum(model.home) / width - setting(text, "vocab_size") * setting(text, "hidden_size")
        speed = (rates.flops if width == 2 else rates.flops_float32) * constants.PASS_FLOPS
        seconds += 2 * count * read / speed
        parts.append(f"{read:,.0f} tokens x 2 x {count / 1e9:.2f} x 10^9 weights in {8 * width} bits")
    return Part(seconds=seconds, how=f"{'; '.join(parts)}: {seconds:.1f} s")


def _push(config: RLConfig, plan: Plan, rates: Rates, links: Links) -> Part:
    """The policy's weights to the engine: from all processes, from main memory, or read, merged, written in place."""
    if is_spread(plan, config):
        size = plan.cast.sizes.parameters * plan.cast.policy.passes.compute.itemsize
        seconds = links.seconds(size, len(plan.cast.sizes.weights))
        return Part(seconds=seconds, how=f"{size / GB:.2f} GB from {plan.processes} processes: {seconds:.2f} s")
    if plan.choices.offload == "always":
        size = plan.cast.policy.weights
        return Part(seconds=size / rates.link, how=f"{size / GB:.2f} GB over the link: {size / rates.link:.2f} s")
    size = plan.cast.engine.weights
    seconds = 3 * size / rates.bandwidth
    return Part(seconds=seconds, how=f"3 x {size / GB:.2f} GB within the card: {seconds:.2f} s")


def _offload(config: RLConfig, plan: Plan, rates: Rates, scores: list[Tenant]) -> Part:
    """The engine's weights go to sleep and come back; with offload, models arrive, and what was trained leaves."""
    cast, moved, parts = plan.cast, 0, []
    if config.vllm_sleep_level == 1:
        moved += 2 * cast.engine.weights
        parts.append(f"the engine sleeps and wakes, 2 x {cast.engine.weights / GB:.2f} GB")
    if plan.choices.offload == "always":
        others = [*scores, *(each for each in cast.others if each.name == "ref")]
        trained = FLOAT32 * sum(cast.sizes.adapter) if config.use_lora else cast.policy.weights
        arrive = cast.policy.weights + cast.policy.moments + sum(each.weights for each in others)
        leave = cast.policy.moments + trained
        moved += arrive + leave
        parts.append(f"models arrive with {arrive / GB:.2f} GB and leave with {leave / GB:.2f}")
    return Part(seconds=moved / rates.link, how=f"{'; '.join(parts)}: {moved / rates.link:.2f} s")
