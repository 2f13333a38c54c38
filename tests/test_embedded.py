"""The tiny policy: the tokenizer gives text back, lessons are true, the cache never gives half a model."""

import hashlib
import multiprocessing
import random
import re
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data.cache import cached_folder
from common.embedded.policy import (
    TINY_POLICIES,
    TinySettings,
    build_policy,
    build_tokenizer,
    lesson_batches,
    lesson_loss,
    recipe,
    save_untrained,
    tiny_policy,
    train_policy,
    write_lesson,
)
from common.embedded.shipped import BATCHES, means, shipped_weights
from common.tasks._arithmetic import evaluate
from common.tasks.countdown import equation_reward, format_reward, problem_key, problems

SMALL = TinySettings(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_lessons=64,
    warmup_steps=2,
)
TOKENIZER = build_tokenizer()


def lessons(number=300, **changes):
    rng, settings = random.Random(1), replace(TinySettings(), **changes)
    return [write_lesson(rng, settings) for _ in range(number)]


def rewards_of(prompt, response):
    nums = [int(word) for word in prompt.split()[:3]]
    target = int(prompt.split()[-1])
    right = equation_reward([prompt], [response], nums=[nums], target=[target])[0]
    return format_reward([prompt], [response])[0], right


# Tokenizer


@given(st.text(alphabet=st.characters(codec="utf-8")).filter(lambda text: unicodedata.is_normalized("NFC", text)))
def test_any_text_comes_back_from_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_a_try_is_eight_tokens():
    line = "3+5=8 *6=48 yes\n"
    assert [TOKENIZER.decode(token) for token in TOKENIZER(line)["input_ids"]] == [
        *("3", "+", "5", "=8", " *", "6", "=48", " yes\n")
    ]


def test_prompt_and_response_are_tokenized_the_same_apart_and_together():
    for prompt, response in lessons(50):
        apart = TOKENIZER(prompt)["input_ids"] + TOKENIZER(response)["input_ids"]
        assert TOKENIZER(prompt + response)["input_ids"] == apart


def test_the_longest_piece_is_taken():
    assert [TOKENIZER.decode(token) for token in TOKENIZER("=120")["input_ids"]] == ["=12", "0"]


def test_special_tokens_vanish_from_decoded_text_and_tags_stay():
    ids = TOKENIZER("<think>a</think><eos><pad>")["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<think>a</think>"


# Lessons


def test_careful_lessons_say_yes_exactly_when_the_answer_is_right():
    for prompt, response in lessons(share_careless=0.0, share_broken=0.0):
        form, right = rewards_of(prompt, response)
        assert form == 1.0
        assert right == (" yes\n" in response)


def test_every_line_of_a_lesson_is_true():
    for prompt, response in lessons(100):
        nums, target = prompt.split()[:3], int(prompt.split()[-1])
        for line in response.split("\n"):
            if "=" not in line:
                continue
            tape, verdict = line.rsplit(" ", 1)
            first, second = tape.split(" ")
            middle, value = first.split("=")[1], second.split("=")[1]
            assert eval(first.split("=")[0]) == int(middle)
            assert eval(middle + second.split("=")[0]) == int(value)
            assert sorted([first[0], first[2], second[1]]) == nums
            assert verdict == ("yes" if int(value) == target else "low" if int(value) < target else "high")


def test_no_try_is_made_twice_in_one_search():
    for _, response in lessons(share_patient=1.0):
        tries_made = [line for line in response.split("\n") if "=" in line]
        assert len(set(tries_made)) == len(tries_made)


def test_careless_and_broken_lessons_have_their_shares():
    broken = [rewards_of(*lesson)[0] for lesson in lessons(2000, share_broken=0.3)].count(0.0) / 2000
    assert 0.26 < broken < 0.34
    hopeless = lessons(2000, share_careless=1.0, share_hindsight=1.0)
    found = [lesson for lesson in hopeless if " yes\n" in lesson[1]]
    assert sum(rewards_of(*lesson)[1] for lesson in found) / len(found) < 0.4


def test_more_patience_means_longer_searches():
    def mean_tries(**changes):
        return sum(response.count("=") / 2 for _, response in lessons(1000, **changes)) / 1000

    assert mean_tries(share_patient=0.0) < mean_tries() < mean_tries(share_patient=1.0)
    assert max(response.count("=") / 2 for _, response in lessons(500, share_patient=1.0, max_tries=5)) == 5


def test_no_lesson_uses_a_held_out_problem():
    held_out = {problem_key(**problem) for problem in problems()[1]}
    for prompt, _ in lessons(3000):
        nums, target = map(int, prompt.split()[:3]), int(prompt.split()[-1])
        assert problem_key(list(nums), target) not in held_out


@pytest.mark.slow
def test_lessons_of_up_to_four_numbers_are_true_and_use_each_number_once():
    sizes = Counter()
    for prompt, response in lessons(400, max_numbers=4, share_careless=0.0, share_broken=0.0):
        nums, target = [int(word) for word in prompt.split(" make ")[0].split()], int(prompt.split()[-1])
        sizes[len(nums)] += 1
        for line in response.split("\n"):
            if "=" not in line:
                continue
            *tape, verdict = line.split(" ")
            value, used = None, []
            for step in tape:
                operation, result = step.split("=")
                used += [int(digit) for digit in re.findall("[0-9]", operation)]
                value = evaluate(operation if value is None else f"{value}{operation}").value
                assert value == int(result)
            assert sorted(used) == nums and len(tape) == len(nums) - 1
            assert verdict == ("yes" if value == target else "low" if value < target else "high")
        right = equation_reward([prompt], [response], nums=[nums], target=[target])[0]
        assert right == (" yes\n" in response) and format_reward([prompt], [response]) == [1.0]
    assert sizes.keys() == {3, 4} and min(sizes.values()) > 50


def test_no_lesson_of_up_to_four_numbers_uses_a_held_out_problem():
    held_out = {problem_key(**problem) for problem in problems(4)[1]}
    for prompt, _ in lessons(3000, max_numbers=4):
        nums, target = [int(word) for word in prompt.split(" make ")[0].split()], int(prompt.split()[-1])
        assert problem_key(nums, target) not in held_out


def test_the_lessons_of_the_demo_are_those_its_published_accuracies_come_from():
    digest = hashlib.sha256(repr(lessons(500)).encode()).hexdigest()
    assert digest.startswith("6af2337fe1de6ac6")


def test_the_longest_lesson_leaves_room_for_a_longer_search():
    longest = max(
        len(TOKENIZER(response)["input_ids"]) for _, response in lessons(300, max_numbers=4, share_patient=1.0)
    )
    assert longest < 300 < TINY_POLICIES["tiny-r1"].max_position_embeddings


def test_batches_hold_every_lesson_once_and_mark_its_response():
    batches = lesson_batches(replace(SMALL, num_lessons=70))
    rng = random.Random(SMALL.seed)
    expected = sorted(write_lesson(rng, SMALL) for _ in range(70))
    found = []
    for ids, weights in batches:
        assert len(ids) <= SMALL.batch_size
        for row, marks in zip(ids, weights > 0, strict=True):
            assert row[marks][-1] == TOKENIZER.eos_token_id
            prompt = row[~marks & (row != TOKENIZER.pad_token_id)]
            found.append((TOKENIZER.decode(prompt), TOKENIZER.decode(row[marks][:-1])))
    assert sorted(found) == expected


def test_what_follows_from_the_text_weighs_more_than_what_is_free():
    ids, weights = lesson_batches(replace(SMALL, num_lessons=1, seed=2))[0]
    by_weight = {weight: [TOKENIZER.decode(token) for token in ids[weights == weight]] for weight in (0.0, 1.0, 4.0)}
    prompt, response = write_lesson(random.Random(2), SMALL)
    assert "".join(by_weight[0.0]) == prompt
    assert len(by_weight[1.0]) + len(by_weight[4.0]) == (weights > 0).sum()
    assert all(
        token.strip() in {*"+-*", *prompt.split()[:3], "<think>", "</think>", "<answer>"} for token in by_weight[1.0]
    )
    assert response.count("=") == sum(token.startswith("=") for token in by_weight[4.0])


# Warm start


def test_training_lowers_the_loss_and_is_the_same_every_time():
    settings = replace(SMALL, num_lessons=320)
    ids, weights = lesson_batches(replace(settings, seed=5))[0]

    def loss(policy):
        return policy(input_ids=ids, labels=torch.where(weights > 0, ids, -100)).loss.item()

    policies = [build_policy(settings) for _ in range(2)]
    before = loss(policies[0])
    for policy in policies:
        train_policy(policy, settings)
    assert loss(policies[0]) < before - 0.5
    assert all(torch.equal(a, b) for a, b in zip(policies[0].parameters(), policies[1].parameters(), strict=True))


def test_making_a_policy_leaves_the_random_states_alone(tmp_path):
    random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state()
    tiny_policy(SMALL, tmp_path)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_the_seed_changes_the_policy():
    first, second = (build_policy(replace(SMALL, seed=seed)).model.embed_tokens.weight for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_folder_loads_with_model_config_tokenizer_and_end_token(tmp_path):
    folder = tiny_policy(SMALL, tmp_path)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert policy.dtype == torch.float32
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id == policy.config.eos_token_id
    assert policy.generation_config.pad_token_id == tokenizer.pad_token_id
    text = "3 5 6 make 48\n<think>\n3+5=8 *6=48 yes\n</think>\n<answer>(3+5)*6</answer><eos>"
    assert tokenizer(text)["input_ids"] == build_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.padding_side == "left"


def test_an_untrained_policy_of_any_size_is_saved(tmp_path):
    folder = save_untrained(tmp_path / "new", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    assert policy.config.hidden_size == 32
    assert len(AutoTokenizer.from_pretrained(folder)) == policy.config.vocab_size


# Weights that come with the repository


def test_tiny_is_not_trained_here(tmp_path, monkeypatch):
    monkeypatch.setattr("common.embedded.policy.train_policy", lambda *_: pytest.fail("trained"))
    shipped = shipped_weights(recipe(TINY_POLICIES["tiny"]))
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy(TINY_POLICIES["tiny"], tmp_path))
    assert policy.dtype == torch.float32
    for name, weights in policy.state_dict().items():
        same = shipped.weights["model.embed_tokens.weight" if name == "lm_head.weight" else name]
        assert torch.equal(weights, same), name


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_lessons": 23_999}, {"share_broken": 0.2}, {"max_numbers": 4}])
def test_another_recipe_is_trained(change):
    assert shipped_weights(recipe(replace(TINY_POLICIES["tiny"], **change))) is None


@pytest.mark.slow
def test_the_shipped_weights_began_and_ended_as_their_recipe_says():
    # The first batches are trained again, and the result is measured on the last ones: on another type of CPU numbers
    # are rounded otherwise, so the loss may differ a little. `python -m common.embedded` trains all batches.
    settings = TINY_POLICIES["tiny"]
    shipped = shipped_weights(recipe(settings))
    policy = build_policy(settings)
    assert means(train_policy(policy, settings, num_batches=BATCHES)) == pytest.approx(shipped.losses[:1], rel=0.02)
    policy.load_state_dict(shipped.weights, strict=False)
    with torch.no_grad():
        losses = [lesson_loss(policy, *batch).item() for batch in lesson_batches(settings)[-BATCHES:]]
    # A little lower than in training, since the weights are those after the last batch.
    assert means(losses) == pytest.approx(shipped.losses[-1:], rel=0.05)


@pytest.mark.models
def test_the_recipe_trains_the_shipped_weights():
    settings = TINY_POLICIES["tiny"]
    assert means(train_policy(build_policy(settings), settings)) == pytest.approx(
        shipped_weights(recipe(settings)).losses, rel=0.1
    )


# Cache


def test_the_second_call_reads_the_cache(tmp_path):
    folder = tiny_policy(SMALL, tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_policy(SMALL, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_other_settings_have_another_folder(tmp_path):
    assert tiny_policy(SMALL, tmp_path) != tiny_policy(replace(SMALL, share_broken=0.2), tmp_path)


def test_the_cache_follows_xdg_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiny_policy(SMALL).parent == tmp_path / "nanorlhf"


@pytest.mark.parametrize("damage", ["truncate", "delete", "no digests"])
def test_a_damaged_folder_is_made_anew(tmp_path, damage):
    folder = tiny_policy(SMALL, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(whole[:100])
    elif damage == "delete":
        weights.unlink()
    else:
        (folder / "digests.json").unlink()
    assert tiny_policy(SMALL, tmp_path) == folder
    assert weights.read_bytes() == whole


def test_an_interrupted_warm_start_leaves_nothing_that_is_picked_up(tmp_path, monkeypatch):
    def interrupt(policy, settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("common.embedded.policy.train_policy", interrupt)
        tiny_policy(SMALL, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (tiny_policy(SMALL, tmp_path) / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_at_once_get_the_same_whole_folder(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.starmap(tiny_policy, [(SMALL, tmp_path)] * 2)
    assert first == second == tiny_policy(SMALL, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [first]


def test_a_folder_is_made_once_if_two_ask_for_it_at_the_same_time(tmp_path):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.3)  # time for the other one to begin too
        (folder / "content").write_text("whole")

    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: cached_folder("name", make, tmp_path), range(2)))
    assert len(made) == 1 and folders[0] == folders[1] == tmp_path / "name"
