"""VinePPO: where chunks begin, completions that begin with given tokens, values, and the gradient they lead to."""

import json
from contextlib import nullcontext
from itertools import islice, product

import pytest
import torch

from common.embedded.policy import save_untrained
from common.rollouts import Completion, PromptBatch, Rollouts
from common.sampling.prefixes import PrefixSampler
from common.sampling.protocol import SamplingSettings, sampling_seed
from common.sampling.torch_sampler import TransformersSampler
from tests.enumeration import PROMPT_IDS, Enumeration, FixedSampler, save_four_token_model
from tests.fixtures_engine import completion_logprobs, untrained_model
from tests.forked import launch
from tests.toy import (
    CLIP,
    KL_PLACE,
    metrics_of,
    toy_trainer,
    trained_weights,
    updates_of,
)
from VinePPO.chunks import chunk_starts
from VinePPO.vineppo_trainer import VinePPOConfig, VinePPOTrainer

TOY_SETTINGS = {"vine_k": 2, "chunk_length": 4}
# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {"vine_k": ({}, 3), "chunk_length": ({}, 5), "chunk_separator": ({}, "1"), "whiten_rewards": ({}, True)}
ACTS |= KL_PLACE
VALUES = {"kl_estimator": [None, "k1", "k2", "k3"]}


def vine_trainer(model, folder, **settings):
    return toy_trainer(model, folder, algorithm="VinePPO", **settings)


# Chunks


def completed(tokenizer, *texts: str) -> Rollouts:
    """One completion for each text."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    prompts = PromptBatch(
        step=1, rows=list(range(len(ids))), prompt_ids=[[5]] * len(ids), prompts=["p"] * len(ids), columns={}
    )
    completions = [Completion(row, [-1.0] * len(row), truncated=False) for row in ids]
    return Rollouts.from_completions(prompts, completions, list(texts), num_generations=1)


def starts_of(tokenizer, *texts: str, chunk_length: int = 1, separator: str | None = None) -> list[list[int]]:
    rollouts = completed(tokenizer, *texts)
    starts = chunk_starts(rollouts, tokenizer, chunk_length=chunk_length, separator=separator)
    assert not (starts & ~rollouts.completion_mask).any()
    return [row.nonzero().flatten().tolist() for row in starts]


def test_chunks_of_equal_length_begin_at_its_multiples_and_the_end_of_a_completion_begins_none(tokenizer):
    assert starts_of(tokenizer, "a" * 7, "a" * 6, "a", chunk_length=3) == [[0, 3, 6], [0, 3], [0]]
    assert starts_of(tokenizer, "abcd", chunk_length=100) == [[0]]


def test_a_chunk_ends_with_the_token_that_completes_the_separator(tokenizer):
    # " low\n" and " high\n" are one token each.
    assert starts_of(tokenizer, "ab low\ncd high\ne", "ab\n", separator="\n") == [[0, 3, 6], [0]]
    assert starts_of(tokenizer, "a\n\nb\nc", separator="\n\n") == [[0, 3]]
    assert starts_of(tokenizer, "xyxyz", separator="xyz") == [[0]]
    assert starts_of(tokenizer, "xyxyz.", "xy.z.xyz.z", separator="xyz") == [[0, 5], [0, 8]]


def test_with_a_separator_a_chunk_has_at_least_chunk_length_tokens(tokenizer):
    assert starts_of(tokenizer, "a\nbc\nd\nef\ng", chunk_length=4, separator="\n") == [[0, 5, 10]]


# Completions that begin with given tokens


@pytest.fixture(params=["vllm", "transformers"])
def sampler(request):
    """Either sampler with the weights of untrained_model(0)."""
    if request.param == "vllm":
        return request.getfixturevalue("vllm_sampler")
    model = untrained_model(0)
    return TransformersSampler(lambda: nullcontext(model), device=torch.device("cpu"))


PROMPTS = [[5, 6, 7], [8], [9 + i % 100 for i in range(70)], [17, 18], [5, 6, 7]]
PREFIXES = [[11, 12, 13], [], [14] * 39, [15], [11, 12]]
SETTINGS = SamplingSettings(temperature=0.8, max_tokens=40, stop_token_ids=(1, 2, 3))
SEEDS = [sampling_seed(0, 1, row, "vine") for row in range(len(PROMPTS))]


def as_prefixes(rows):
    return [Completion(ids, [-0.5] * len(ids), truncated=True) for ids in rows]


def test_a_completion_begins_with_its_prefix_and_goes_on_as_the_policy_does_within_the_limit(sampler):
    prefixed = PrefixSampler(sampler, as_prefixes(PREFIXES), max_prompt_length=70)
    completions = prefixed.generate(PROMPTS, SETTINGS, num_generations=3, seeds=SEEDS)
    assert len(completions) == 15
    model = untrained_model(0)
    for number, completion in enumerate(completions):
        prompt, prefix = PROMPTS[number // 3], PREFIXES[number // 3]
        ids, place = completion.token_ids, len(prefix)
        assert ids[:place] == prefix and completion.logprobs[:place] == [-0.5] * place
        assert place < len(ids) <= 40
        assert not any(token in (1, 2, 3) for token in ids[place:-1])
        assert completion.truncated == (len(ids) == 40 and ids[-1] not in (1, 2, 3))
        expected = completion_logprobs(model, prompt + prefix, ids[place:], 0.8)
        torch.testing.assert_close(torch.tensor(completion.logprobs[place:]), expected, atol=2e-4, rtol=1e-3)
    assert completions[6].token_ids != completions[7].token_ids or completions[6].token_ids != completions[8].token_ids
    assert {len(completion.token_ids) for completion in completions[6:9]} == {40}  # one token was left


def test_which_prefixes_share_a_request_changes_no_completion(sampler):
    apart, together = (
        PrefixSampler(sampler, as_prefixes(PREFIXES), max_prompt_length=limit).generate(
            PROMPTS, SETTINGS, num_generations=2, seeds=SEEDS
        )
        for limit in (70, 200)
    )
    assert [c.token_ids for c in apart] == [c.token_ids for c in together]
    assert [c.truncated for c in apart] == [c.truncated for c in together]
    alone = [
        PrefixSampler(sampler, as_prefixes([prefix]), max_prompt_length=70).generate(
            [prompt], SETTINGS, num_generations=2, seeds=[seed]
        )
        for prompt, prefix, seed in zip(PROMPTS, PREFIXES, SEEDS, strict=True)
    ]
    assert [c.token_ids for pair in alone for c in pair] == [c.token_ids for c in apart]


def test_an_empty_prefix_is_none(sampler):
    prefixed = PrefixSampler(sampler, as_prefixes([[]] * 5), max_prompt_length=200)
    ours = prefixed.generate(PROMPTS, SETTINGS, num_generations=2, seeds=SEEDS)
    assert ours == sampler.generate(PROMPTS, SETTINGS, num_generations=2, seeds=SEEDS)


class Recording:
    """A sampler that keeps what it was asked for."""

    def __init__(self, sampler) -> None:
        self.sampler, self.requests = sampler, []
        self.needs_push, self.resident_bytes, self.has_weights = False, 0, True
        self.push, self.sleep, self.wake = sampler.push, sampler.sleep, sampler.wake

    def generate(self, prompt_ids, settings, *, num_generations=1, seeds=None):
        self.requests.append((prompt_ids, settings.max_tokens, seeds))
        return self.sampler.generate(prompt_ids, settings, num_generations=num_generations, seeds=seeds)


def test_no_request_is_longer_than_the_sampler_takes_and_equal_prefixes_need_one_request(toy_folder, tmp_path):
    for separator, length in ((None, 4), ("1", 1), (None, 1)):
        trainer = vine_trainer(
            toy_folder,
            tmp_path / f"{separator}{length}",
            chunk_separator=separator,
            chunk_length=length,
            num_steps=1,
            max_prompt_length=9,
        )
        trainer.policy_sampler.sampler = recording = Recording(trainer.policy_sampler.sampler)
        trainer.train()
        for prompts, max_tokens, _ in recording.requests:
            assert max(map(len, prompts)) + max_tokens <= 9 + 12
        assert len(recording.requests) <= 1 + 12 / length


def test_every_seed_of_a_run_is_another_one(toy_folder, tmp_path):
    trainer = vine_trainer(toy_folder, tmp_path / "run", chunk_length=1, num_generations=2, num_steps=3)
    trainer.policy_sampler.sampler = recording = Recording(trainer.policy_sampler.sampler)
    trainer.train()
    seeds = [seed for _, _, seeds in recording.requests for seed in seeds]
    assert len(seeds) > 100 and len(set(seeds)) == len(seeds)


def test_a_continuation_is_scored_as_a_completion_of_its_prompt_with_its_columns(toy_folder, tmp_path):
    trainer = vine_trainer(toy_folder, tmp_path / "run", missing_eos_penalty=0.25)
    trainer.current_step = 1
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    rows, places = torch.tensor([15, 3, 7]), torch.tensor([2, 0, 1])
    rows = torch.where(rollouts.lengths[rows] > places, rows, rollouts.lengths.argmax())
    vine = trainer.continue_from(rollouts, rows, places, num_generations=3, purpose="vine")
    for number, text in enumerate(vine.completions):
        row, place = int(rows[number // 3]), int(places[number // 3])
        assert vine.prompts[number] == rollouts.prompts[row]
        assert vine.columns["total"][number] == rollouts.columns["total"][row]
        ids = vine.completion_ids[number][vine.completion_mask[number]].tolist()
        assert ids[:place] == rollouts.completion_ids[row, :place].tolist()
        assert text == trainer.tokenizer.decode(ids, skip_special_tokens=True)
    expected = vine.truncated * -0.25 + trainer.scorer(vine.prompts, vine.completions, vine.columns)[0]
    torch.testing.assert_close(trainer.score(vine), expected)


# Values and advantages of a step


def values_seen_by(trainer) -> list:
    """(rollouts, states, values) of each call of state_values, in a list that fills as the trainer goes."""
    seen, state_values = [], trainer.state_values

    def recorded(rollouts, to_value):
        seen.append((rollouts, to_value, state_values(rollouts, to_value)))
        return seen[-1][2]

    trainer.state_values = recorded
    return seen


def test_the_advantage_of_a_chunk_is_what_it_changed_by_hand(toy_folder, tmp_path):
    trainer = vine_trainer(toy_folder, tmp_path / "run", num_steps=1, chunk_length=3, missing_eos_penalty=0.25)
    seen, updates = values_seen_by(trainer), updates_of(trainer)
    trainer.train()
    ((_, rollouts),), ((_, to_value, values),) = updates, seen
    scores = rollouts.scores.tolist()
    assert to_value[:, 3:].any() and not to_value[:, 0].any()
    for row, length in enumerate(rollouts.lengths.tolist()):
        group = row // 4 * 4
        others = [scores[i] for i in range(group, group + 4) if i != row]
        marks = [sum(others) / 3, *(float(values[row, t]) for t in range(3, length, 3)), scores[row]]
        expected = [marks[t // 3 + 1] - marks[t // 3] for t in range(length)]
        torch.testing.assert_close(rollouts.advantages[row, :length], torch.tensor(expected), atol=1e-6, rtol=1e-5)
        assert not rollouts.advantages[row, length:].any()


def test_a_value_is_the_mean_score_of_its_continuations(toy_folder, tmp_path):
    trainer = vine_trainer(toy_folder, tmp_path / "run", vine_k=5, num_generations=1, num_steps=1)
    seen, score, scored = values_seen_by(trainer), trainer.score, []
    trainer.score = lambda rollouts: scored.append((rollouts, score(rollouts))) or scored[-1][1]
    trainer.train()
    ((rollouts, to_value, values),), (_, (vine, scores)) = seen, scored
    assert to_value[:, 0].all()  # a single completion is no baseline of its own
    assert len(vine) == 5 * to_value.sum()
    torch.testing.assert_close(values[to_value], scores.reshape(-1, 5).mean(1))
    assert not values[~to_value].any()
    line = metrics_of(tmp_path / "run")[0]
    assert line["vine/continuations"] == len(vine)
    assert line["vine/tokens"] == vine.lengths.sum() - 5 * to_value.nonzero()[:, 1].sum()
    assert line["tokens"] == line["vine/tokens"] + rollouts.lengths.sum()


def test_values_do_not_depend_on_who_else_is_on_the_process(toy_folder, tmp_path):
    trainer = vine_trainer(toy_folder, tmp_path / "run", chunk_length=2)
    trainer.current_step = 1
    values = {}
    for num_processes in (1, 2):
        parts = []
        for process in range(num_processes):
            prompts = trainer.prompts.batch(1, num_prompts=4, process=process, num_processes=num_processes)
            rollouts = trainer.policy_sampler.sample(prompts, num_generations=4, greedy=False, purpose="train")
            starts = chunk_starts(rollouts, trainer.tokenizer, chunk_length=2, separator=None)
            part = trainer.state_values(rollouts, starts)
            parts.append(torch.nn.functional.pad(part, (0, 12 - part.shape[1])))
        values[num_processes] = torch.cat(parts)
    assert values[1].any() and torch.equal(values[1], values[2])


@pytest.mark.parametrize("whitened", [False, True])
def test_with_one_chunk_it_is_rloo_with_the_ratio_of_tokens(toy_folder, tmp_path, whitened):
    common = {"average_over": "tokens", "num_minibatches": 2, "num_update_epochs": 2, "missing_eos_penalty": 0.2}
    common["whiten_rewards"] = whitened
    vine = vine_trainer(toy_folder, tmp_path / "vine", chunk_length=12, **common)
    rloo = toy_trainer(toy_folder, tmp_path / "rloo", algorithm="RLOO", ratio_level="token", **common)
    torch.testing.assert_close(trained_weights(vine), trained_weights(rloo), atol=1e-5, rtol=1e-4)
    assert metrics_of(tmp_path / "vine")[-1]["vine/tokens"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vine_k": 0}, r"vine_k=0.*Pass --vine_k 3"),
        ({"chunk_length": 0}, r"chunk_length=0.*--chunk_length 100"),
        ({"chunk_separator": ""}, r"chunk_separator=''.*Pass the text"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VinePPOConfig(**settings)


# The gradient of E[score] - kl_coef KL: every completion with every continuation of each of its states, once


class Scripted(FixedSampler):
    """Gives the completions to the first request; to later ones, by the length of their prefixes, continuations."""

    def __init__(self, completions, continuations) -> None:
        super().__init__(completions)
        self.begun, self.continuations = False, {place: iter(rows) for place, rows in continuations.items()}

    def generate(self, prompt_ids, settings, *, num_generations=1, seeds=None):
        if not self.begun:
            self.begun = True
            return super().generate(prompt_ids, settings, num_generations=num_generations, seeds=seeds)
        place = len(prompt_ids[0]) - len(PROMPT_IDS)
        return list(islice(self.continuations[place], len(prompt_ids) * num_generations))


def continuations_of(world, completions: list[Completion], state: list[int]) -> list[tuple[float, Completion]]:
    """Everything that can follow a state, with its probability."""
    place = len(state)
    found = [i for i, ids in enumerate(world.ids) if ids[:place] == state and len(ids) > place]
    probabilities = world.probabilities.detach()[found]
    whole = [completions[i] for i in found]
    rests = [Completion(c.token_ids[place:], c.logprobs[place:], c.truncated) for c in whole]
    return list(zip((probabilities / probabilities.sum()).tolist(), rests, strict=True))


def gradient_of_step(world, folder, **settings):
    """What the one optimizer step expects, where completions and continuations are as random as they are."""
    trainer = world.trainer(VinePPOTrainer, folder, average_over="constant", **settings)
    config, completions = trainer.config, world.completions
    prompts = PromptBatch(
        step=1, rows=list(range(len(completions))), prompt_ids=[PROMPT_IDS] * len(completions),
        prompts=["ba"] * len(completions), columns={},
    )  # fmt: skip
    rollouts = Rollouts.from_completions(prompts, completions, world.texts, num_generations=1)
    cut = {"chunk_length": config.chunk_length, "separator": config.chunk_separator}
    starts = chunk_starts(rollouts, trainer.tokenizer, **cut)
    starts[:, 0] = config.num_generations == 1
    rows = []  # (probability, completion, [(place, continuation), ...])
    for i, completion in enumerate(completions):
        places = starts[i].nonzero().flatten().tolist()
        choices = [
            continuations_of(world, completions, completion.token_ids[:place])
            for place in places
            for _ in range(config.vine_k)
        ]
        for chosen in product(*choices):
            probability = world.probabilities[i].item()
            for p, _ in chosen:
                probability *= p
            vine = [(places[n // config.vine_k], rest) for n, (_, rest) in enumerate(chosen)]
            rows.append((probability, completion, vine))
    groups = list(product(rows, repeat=config.num_generations))
    probabilities = torch.tensor([[row[0] for row in group] for group in groups], dtype=torch.float64).prod(1)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)
    script: dict[int, list[Completion]] = {}
    for group in groups:
        for _, _, vine in group:
            for place, rest in vine:
                script.setdefault(place, []).append(rest)
    trainer.policy_sampler.sampler = Scripted([row[1] for group in groups for row in group], script)
    (gradient,) = world.weighed_step(trainer, probabilities)
    return gradient


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All 40 completions of at most three tokens."""
    return Enumeration(save_four_token_model(tmp_path_factory.mktemp("four tokens")), max_length=3)


@pytest.fixture(scope="module")
def small_world(world):
    """All 13 completions of at most two tokens."""
    return Enumeration(world.folder, max_length=2)


def difference(gradient, expected):
    """Relative to the expected one."""
    return float((gradient - expected).norm() / expected.norm())


def objective(world, kl_coef):
    """What is to be maximised: E[score] - kl_coef KL(policy || reference)."""
    return (world.probabilities * world.scores).sum() - kl_coef * world.kl


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_generations": 1, "vine_k": 1, "chunk_length": 1},
        {"num_generations": 1, "vine_k": 2, "chunk_length": 2},
        {"num_generations": 2, "vine_k": 1, "chunk_length": 1},
    ],
    ids=["alone", "alone, two continuations", "in pairs"],
)
def test_a_step_expects_exactly_the_gradient_of_score_less_kl(small_world, tmp_path, settings, kl_coef):
    gradient = gradient_of_step(small_world, tmp_path, kl_coef=kl_coef, **settings)
    assert difference(gradient, -small_world.gradient(objective(small_world, kl_coef))) < 1e-5
    # The test sees a KL that is missing, and one that is too much.
    assert difference(gradient, -small_world.gradient(objective(small_world, 0.3 - kl_coef))) > 0.1


@pytest.mark.parametrize("group", [1, 2], ids=["alone", "in pairs"])
def test_with_the_kl_in_the_loss_a_step_expects_that_of_the_score_less_the_kl_of_each_state(
    small_world, tmp_path, group
):
    """k3: KL(reference || policy) of the next token, where the policy comes to."""
    world, settings = small_world, {"num_generations": group, "vine_k": 1, "chunk_length": 1}
    gradient = gradient_of_step(world, tmp_path, kl_coef=0.3, kl_place="loss", **settings)
    of_state = (world.ref_logits.exp() * (world.ref_logits - world.policy_logits)).sum(-1)  # (N, T)
    of_states = (world.probabilities.detach()[:, None] * world.mask * of_state).sum()
    expected = -world.gradient(objective(world, 0.0)) + 0.3 * world.gradient(of_states)
    assert difference(gradient, expected) < 1e-5
    assert difference(gradient, -world.gradient(objective(world, 0.3))) > 0.01  # in the reward it is another one


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"chunk_length": 2}, {"chunk_length": 1, "chunk_separator": "a"}],
    ids=["two tokens", "up to the next letter a"],
)
def test_chunks_of_several_tokens_and_of_any_number_expect_it_too(world, tmp_path, settings):
    gradient = gradient_of_step(world, tmp_path, num_generations=1, vine_k=1, kl_coef=0.3, **settings)
    assert difference(gradient, -world.gradient(objective(world, 0.3))) < 1e-5


def test_a_value_that_knows_what_the_completion_did_there_would_be_seen(small_world, tmp_path, monkeypatch):
    """The score of the completion itself in place of its continuations': the last chunk has no gradient then."""

    def own_scores(trainer, rollouts, to_value):
        return torch.where(to_value, rollouts.scores[:, None], 0.0)

    monkeypatch.setattr(VinePPOTrainer, "state_values", own_scores)
    gradient = gradient_of_step(small_world, tmp_path, num_generations=2, vine_k=1, chunk_length=1)
    assert difference(gradient, -small_world.gradient(objective(small_world, 0.0))) > 0.1


# Whole runs


@pytest.mark.slow
def test_with_vllm_continuations_are_the_trained_policys_and_a_run_resumes(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = save_untrained(tmp_path / "model", **sizes, **heads, initializer_range=0.2)
    settings = {"sampler": "vllm", "temperature": 0.7, "learning_rate": 2e-2, "save_every": 2, "chunk_length": 5}
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for num_steps in steps:
            trainer = vine_trainer(model, tmp_path / name, num_steps=num_steps, **settings)
            trainer.train()
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    trainer.current_step = 5
    rollouts = trainer.sample(trainer.training_prompts(5), num_generations=4)
    rows = (rollouts.lengths > 5).nonzero().flatten()
    vine = trainer.continue_from(rollouts, rows, torch.full((len(rows),), 5), num_generations=3, purpose="vine")
    vine.step_lengths = vine.lengths
    vine.rows = torch.arange(len(vine))
    logprobs = trainer.logprobs("policy", vine)
    torch.testing.assert_close(logprobs, vine.sampling_logprobs, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_folder, tmp_path):
    lines = {}
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        words = [
            *("VinePPO/vineppo.py", "--preset", "cpu", "--model", tiny_folder, "--sampler", "transformers"),
            *("--output_dir", folder, "--num_steps", "2", "--prompts_per_step", "4", "--num_generations", "2"),
            *("--max_completion_length", "24", "--chunk_length", "7", "--eval_every", "0", "--kl_coef", "0.01"),
            *("--task", "countdown", "--use_lora", "false", "--max_prompt_length", "16", "--learning_rate", "3e-4"),
        ]
        launch(num_processes, words)
        lines[num_processes] = [
            json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    for one, two in zip(lines[1], lines[2], strict=True):
        assert one["vine/tokens"] > 0
        for name, value in one.items():
            if not name.startswith(("time/", "memory/")):
                assert two[name] == pytest.approx(value, abs=1e-5), name
