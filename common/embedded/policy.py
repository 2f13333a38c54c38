"""A tiny policy that needs no download: a Qwen2 model of half a million parameters and a real tokenizer.

It is warm-started by supervised learning on written-out searches for Countdown solutions. It learns to try, check and
answer, but it gives up early and sometimes answers carelessly, which leaves something for RL to teach. `TinySettings`
determine everything; the result is kept in the user's cache folder. The weights of "tiny" come with the repository
(shipped.py); other policies are trained on first use. ``python -m common.embedded.policy`` makes "tiny" and prints its
accuracy on problems it was never trained on.
"""

import hashlib
import json
import math
import random
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import AddedToken, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from common.data.cache import cached_folder, folder_anywhere
from common.data.texts import completion_texts
from common.embedded.shipped import shipped_weights
from common.mistakes import first_line
from common.tasks.countdown import (
    NUMBERS,
    OPERATORS,
    TARGETS,
    Try,
    compact_prompt,
    equation_reward,
    problem_key,
    problems,
    tries,
)

PAD, EOS = "<pad>", "<eos>"
VERDICTS = [" low\n", " yes\n", " high\n"]
WORDS = [
    *("<think>", "</think>", "<answer>", "</answer>", " make"),
    *VERDICTS,
    *(f" {operator}" for operator in OPERATORS),
    *(str(number) for number in range(10, 100)),
    *(f"={number}" for number in range(100)),
]
MAX_COMPLETION = 240  # tokens; enough for the longest lesson


@dataclass(frozen=True, kw_only=True)
class TinySettings:
    """Everything that determines the tiny policy.

    Attributes:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads: as in Qwen2Config.
        initializer_range: standard deviation of the initial weights.
        max_position_embeddings: longest prompt and completion together, in tokens.
        num_lessons: written-out searches to learn from, each seen once.
        share_hindsight: share of lessons whose target is the result of their last try, so that they end in success.
        share_patient: share of searches that continue with `patience_high` after a failed try, not `patience_low`.
        patience_low: probability of continuing after a failed try.
        patience_high: the same for a patient search.
        max_tries: length of the longest search.
        share_careless: share of lessons that answer with a random expression, not the one that was found.
        share_broken: share of lessons in which a tag is missing.
        emphasis: loss weight of tokens that follow from the text before them (results, verdicts, answers), against 1
            for free choices (operators, the start of a line); facts are learned sooner than with equal weights.
        batch_size: lessons per optimizer step.
        learning_rate: highest rate of AdamW; linear warm-up, then a cosine down to a twentieth.
        warmup_steps: optimizer steps of the warm-up.
        seed: of the initial weights, the lessons and their order.
        max_numbers: numbers of a problem: 3, or 4 for problems with three or four.
    """

    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    initializer_range: float = 0.06
    max_position_embeddings: int = 512
    num_lessons: int = 24_000
    share_hindsight: float = 0.5
    share_patient: float = 0.25
    patience_low: float = 0.6
    patience_high: float = 0.95
    max_tries: int = 24
    share_careless: float = 0.1
    share_broken: float = 0.1
    emphasis: float = 4.0
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 30
    seed: int = 0
    max_numbers: int = 3


TINY_POLICIES = {
    "tiny": TinySettings(),
    # Tries with four numbers are longer and harder, so there are more lessons. It gives up even earlier, so that its
    # completions have room to grow.
    "tiny-r1": TinySettings(max_numbers=4, num_lessons=32_000, patience_low=0.4, share_patient=0.15),
}
"""The embedded policies by the name that the setting `model` gives them."""


# Model and tokenizer


def build_tokenizer() -> Qwen2Tokenizer:
    """Make a Qwen2 tokenizer of bytes and longer tokens: numbers up to 99, results, tags, the words of a search.

    The longest matching token is taken; other text becomes bytes, so that decoding gives any text back. The class is
    Qwen2's, since `AutoTokenizer` loads no other with a Qwen2 model.
    """
    alphabet = [PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Qwen2Tokenizer(vocabulary, [], unk_token=None, eos_token=EOS, pad_token=PAD, padding_side="left")
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in WORDS])
    return tokenizer


def build_policy(settings: TinySettings, tokenizer: PreTrainedTokenizerBase | None = None) -> Qwen2ForCausalLM:
    """Make an untrained float32 policy for a tokenizer (None: this module's); keeps the global random state."""
    tokenizer = tokenizer or build_tokenizer()
    config = policy_config(settings, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        policy = Qwen2ForCausalLM(config)
    policy.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return policy


def policy_config(settings: TinySettings, tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """The architecture of a policy for a tokenizer."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=settings.max_position_embeddings,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def save_untrained(folder: str | Path, **sizes: int) -> Path:
    """Save an untrained policy and the tokenizer, for tests.

    Args:
        folder: created if missing.
        sizes: fields of `TinySettings` that differ from its defaults, such as ``hidden_size=32``.

    Returns:
        The folder.
    """
    build_policy(TinySettings(**sizes)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return Path(folder)


# Lessons


def write_lesson(rng: random.Random, settings: TinySettings) -> tuple[str, str]:
    r"""Write a prompt and a search for its solution, which is often but not always good.

    ::

        response := "<think>\n" try+ "</think>\n<answer>" expression "</answer>"
        try      := "3+5=8 *6=48" (" low" | " high" | " yes") "\n"

    Held-out problems never occur.

    Args:
        rng: the only source of randomness.
        settings: the shares and probabilities.
    """
    while True:
        nums, target, attempts = _search(rng, settings)
        if target in TARGETS and problem_key(nums, target) not in _held_out_keys(settings.max_numbers):
            break
    lines = [attempt.steps + _verdict(attempt.value, target) for attempt in attempts]
    answer = attempts[-1].expression
    if rng.random() < settings.share_careless:
        answer = rng.choice(tries(tuple(nums))).expression
    thought, answer = f"<think>\n{''.join(lines)}</think>\n", f"<answer>{answer}</answer>"
    if rng.random() < settings.share_broken:
        if rng.random() < 0.5:
            thought = thought.removesuffix("</think>\n")
        else:
            answer = answer.removeprefix("<answer>").removesuffix("</answer>")
    return compact_prompt(nums, target), thought + answer


def _search(rng: random.Random, settings: TinySettings) -> tuple[list[int], int, list[Try]]:
    """Draw numbers, a target and tries, which end with the first success or when patience runs out."""
    patience = settings.patience_high if rng.random() < settings.share_patient else settings.patience_low
    num_tries = 1
    while num_tries < settings.max_tries and rng.random() < patience:
        num_tries += 1
    hindsight = rng.random() < settings.share_hindsight
    if hindsight:
        size = 3 if settings.max_numbers == 3 else rng.randint(3, settings.max_numbers)  # one size needs no draw
        problem = {"nums": sorted(rng.choices(NUMBERS, k=size))}
    else:
        problem = rng.choice(problems(settings.max_numbers)[0])
    nums = problem["nums"]
    options = tries(tuple(nums))
    attempts = rng.sample(options, min(num_tries, len(options)))
    target = attempts[-1].value if hindsight else problem["target"]
    hits = [number for number, attempt in enumerate(attempts, start=1) if attempt.value == target]
    return nums, target, attempts[: hits[0]] if hits else attempts


def _verdict(value: int, target: int) -> str:
    return VERDICTS[1 if value == target else 0 if value < target else 2]


@cache
def _held_out_keys(max_numbers: int) -> frozenset:
    return frozenset(problem_key(**problem) for problem in problems(max_numbers)[1])


# Warm start


def tiny_policy(
    settings: TinySettings = TinySettings(), cache_dir: str | Path | None = None, *, beside: Path | None = None
) -> Path:
    """Return the folder of the warm-started policy and its tokenizer; make it first if it is not cached.

    The folder's name is a hash of the settings, the tokens and the first lessons, or of the weights that are shipped.

    Args:
        settings: what to make.
        cache_dir: parent folder; None: ``nanorlhf`` in the user's cache folder, or another place: see
            `folder_anywhere`.
        beside: a folder of the user's, such as that of runs, for a user without a cache folder.

    Returns:
        A folder for `from_pretrained` and for vLLM.

    Raises:
        ValueError: it can be kept nowhere.
    """
    name = recipe(settings)
    shipped = shipped_weights(name)

    @cache
    def warm_started() -> Qwen2ForCausalLM:  # once, also if a place turns out to be full
        policy = build_policy(settings)
        if shipped is None:
            train_policy(policy, settings)
        else:
            policy.load_state_dict(shipped.weights | {"lm_head.weight": shipped.weights["model.embed_tokens.weight"]})
        return policy

    def make(folder: Path) -> None:
        try:
            warm_started().save_pretrained(folder)
        except SafetensorError as error:  # of a full disk
            raise OSError(first_line(error)) from error
        build_tokenizer().save_pretrained(folder)

    name = f"tiny-{name if shipped is None else shipped.digest}"
    if cache_dir is not None:
        return cached_folder(name, make, cache_dir)
    return folder_anywhere(name, make, what="the embedded policy", beside=beside)


def recipe(settings: TinySettings) -> str:
    """A hash of all that determines a policy: the settings, the tokens and the first lessons."""
    rng = random.Random(settings.seed)
    lessons = [write_lesson(rng, settings) for _ in range(100)]
    # max_numbers already changes the lessons.
    described = {name: value for name, value in asdict(settings).items() if name != "max_numbers"}
    return hashlib.sha256(json.dumps([described, WORDS, lessons]).encode()).hexdigest()[:16]


def train_policy(policy: Qwen2ForCausalLM, settings: TinySettings, *, num_batches: int | None = None) -> list[float]:
    """Train the policy on the lessons for one epoch, by the likelihood of the responses, with a progress bar.

    Args:
        policy: trained in place.
        settings: lessons and optimization.
        num_batches: stop after so many, of the same schedule; None: all.

    Returns:
        The loss of each batch.
    """
    batches = lesson_batches(settings)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    losses: list[float] = []
    # In a file or pipe every update is a new line, so there is one every ten seconds.
    pause = 0.1 if sys.stderr.isatty() else 10.0
    chosen = batches[:num_batches]
    progress = tqdm(chosen, desc="Warm start of the tiny policy", unit="batch", mininterval=pause, maxinterval=pause)
    for step, (ids, weights) in enumerate(progress):
        rise = min(1.0, (step + 1) / settings.warmup_steps)
        fall = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rise * fall
        loss = lesson_loss(policy, ids, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def lesson_loss(policy: Qwen2ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean of -log p over the tokens that are learned, a scalar; ids and weights as in lesson_batches."""
    # Right padding under a causal mask: no real token sees it, so no attention mask is needed.
    hidden = policy.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (b, length - 1, hidden)
    learned = weights[:, 1:] > 0
    losses = F.cross_entropy(policy.lm_head(hidden[learned]), ids[:, 1:][learned], reduction="none")
    return (losses * weights[:, 1:][learned]).sum() / weights.sum()


def lesson_batches(settings: TinySettings) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write all lessons and batch those of similar length.

    Returns:
        For each optimizer step the token ids, right-padded, (b, length) int64, and the weights of their losses,
        (b, length) float: 0 for prompt and padding, 1 or `emphasis` for the response and its end token.
    """
    rng = random.Random(settings.seed)
    tokenizer = build_tokenizer()
    lessons = [write_lesson(rng, settings) for _ in range(settings.num_lessons)]
    prompts = tokenizer([prompt for prompt, _ in lessons])["input_ids"]
    responses = tokenizer([response + EOS for _, response in lessons])["input_ids"]
    rows = list(zip(prompts, responses, strict=True))
    operators = torch.tensor(
        tokenizer.convert_tokens_to_ids([*OPERATORS, *(f" {operator}" for operator in OPERATORS)])
    )
    line_ends = torch.tensor([*tokenizer.convert_tokens_to_ids(VERDICTS), *tokenizer("\n")["input_ids"]])
    batches = []
    # Lessons are in random order; sorting within chunks of 16 batches keeps the order random on a large scale.
    chunk = 16 * settings.batch_size
    for start in range(0, len(rows), chunk):
        by_length = sorted(rows[start : start + chunk], key=lambda row: len(row[0]) + len(row[1]))
        groups = [by_length[i : i + settings.batch_size] for i in range(0, len(by_length), settings.batch_size)]
        rng.shuffle(groups)
        for group in groups:
            ids, is_response = _padded(group, tokenizer.pad_token_id)
            free = torch.isin(ids, operators)
            free[:, 1:] |= torch.isin(ids[:, :-1], line_ends)
            batches.append((ids, is_response * torch.where(free, 1.0, settings.emphasis)))
    return batches


def _padded(rows: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), length), pad_id)
    is_response = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        is_response[row, len(prompt) : end] = True
    return ids, is_response


@torch.no_grad()
def held_out_accuracy(folder: Path) -> float:
    """Share of the held-out problems that the policy in a folder solves, with one sample of each."""
    policy, tokenizer = Qwen2ForCausalLM.from_pretrained(folder), build_tokenizer()
    rows = problems()[1]
    prompts = tokenizer([compact_prompt(**row) for row in rows], return_tensors="pt", padding=True)
    room = policy.config.max_position_embeddings - prompts["input_ids"].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = policy.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=min(MAX_COMPLETION, room))
    new = ids[:, prompts["input_ids"].shape[1] :].tolist()
    completions = completion_texts(tokenizer, new, [tokenizer.eos_token_id])
    columns = {name: [row[name] for row in rows] for name in ("nums", "target")}
    return sum(equation_reward([""] * len(rows), completions, **columns)) / len(rows)


if __name__ == "__main__":
    made = tiny_policy()
    print(f"{made}\nheld-out accuracy {held_out_accuracy(made):.3f} ({len(problems()[1])} problems, one sample each)")
