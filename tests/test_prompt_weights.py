"""The setting `prompt_weights`: how often each prompt comes, in which order, and what files are refused."""

import json
import math
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.order import PromptOrder
from common.data.prompt_weights import WeightsFile, weight_of
from common.data.prompts import PromptSet
from common.embedded.policy import build_tokenizer
from PPO.value_initializer import held_out_and_fitted
from tests.toy import metrics_of, samples_of, toy_task, toy_trainer, train_until

FEW = st.lists(st.sampled_from([0.0, 0.001, 0.3, 1.0, 7.0, 1e300]), min_size=1, max_size=40).filter(any)


def rows_of(*weights: object) -> list[dict]:
    return [{"prompt": f"{number} make 1\n", "weight": weight} for number, weight in enumerate(weights)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompt_set(path: Path, rows: list[dict], weights: list[dict] | None = None) -> PromptSet:
    """Prompts with the weights of other rows."""
    file = None if weights is None else WeightsFile(write(path / "weights.jsonl", weights))
    return PromptSet(rows, build_tokenizer(), max_prompt_length=20, seed=0, weights=file)


# The order


@settings(max_examples=60, deadline=None)
@given(FEW, st.integers(0, 3))
def test_a_prompt_comes_its_share_of_an_epoch_rounded_down_or_up(weights, epoch):
    counts = np.bincount(PromptOrder(len(weights), 0, np.array(weights)).of_epoch(epoch, "prompts"))
    counts = np.pad(counts, (0, len(weights) - len(counts)))
    assert counts.sum() == len(weights)
    for weight, count in zip(weights, counts, strict=True):
        share = len(weights) * weight / math.fsum(weights)
        assert abs(count - share) < 1 + 1e-6 and (share > 0 or not count)


def test_over_many_epochs_a_prompt_comes_as_often_as_its_weight_says():
    for weights in (np.array([1.0, 5.0, 2.0, 4.0] * 50) / 3, np.array([0.3, 1.7])):
        order = PromptOrder(len(weights), 0, weights)
        counts = sum(np.bincount(order.of_epoch(epoch, "prompts"), minlength=len(weights)) for epoch in range(1500))
        # The rounding of an epoch deviates by at most half a place, independently of other epochs.
        assert np.abs(counts / 1500 - weights).max() < 4.5 * 0.5 / math.sqrt(1500)


@pytest.mark.parametrize("weight", [1.0, 0.1, 3e300, 1e-310])
@pytest.mark.parametrize("count", [1, 3, 49, 764])
def test_equal_weights_are_the_order_without_weights(count, weight):
    weighted, plain = PromptOrder(count, 5, np.full(count, weight)), PromptOrder(count, 5)
    assert weighted.of_epoch(2, "prompts") == plain.of_epoch(2, "prompts")
    assert weighted.drawn(2, "spare prompts") == plain.drawn(2, "spare prompts")


def test_the_copies_of_a_prompt_are_spread_over_the_epoch():
    """The most frequent prompt comes 6 times in 120 places; a step of 15 never has it twice."""
    weights = np.ones(120)
    weights[:5] = 6.3
    for epoch in range(20):
        order = PromptOrder(120, 0, weights).of_epoch(epoch, "prompts")
        assert all(len(set(order[start : start + 15])) == 15 for start in range(0, 106))


def test_spare_prompts_are_drawn_in_proportion_to_their_weights():
    weights = np.array([0.0, 1.0, 2.0, 5.0])
    drawn = [PromptOrder(4, seed, weights).drawn(1, "spare prompts") for seed in range(4000)]
    assert all(sorted(each) == [1, 2, 3] for each in drawn)
    first, second = (np.bincount([each[place] for each in drawn], minlength=4) / 4000 for place in (0, 1))
    assert first == pytest.approx([0, 1 / 8, 2 / 8, 5 / 8], abs=4.5 * 0.5 / math.sqrt(4000))
    # The first of them after one of the others: 2/8 x 1/6 + 5/8 x 1/3, and so on.
    assert second == pytest.approx([0, 21 / 84, 38 / 84, 25 / 84], abs=4.5 * 0.5 / math.sqrt(4000))


def test_a_million_prompts_take_a_fraction_of_a_second_each_step():
    weights = np.arange(1.0, 1e6 + 1)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    order = PromptOrder(10**6, 0, weights)
    assert len(order.of_epoch(0, "prompts")) == len(order.drawn(1, "spare prompts")) == 10**6
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


# Prompts with weights


def test_processes_take_their_parts_of_one_order_and_refills_keep_to_the_weights(tmp_path):
    weights = rows_of(0, 0, *range(1, 19))
    prompts = prompt_set(tmp_path, rows_of(*[1] * 20), weights)
    for step in range(1, 6):
        whole = prompts.batch(step, num_prompts=6)
        parts = [prompts.batch(step, num_prompts=6, process=process, num_processes=2) for process in (0, 1)]
        assert [text for part in parts for text in part.prompts] == whole.prompts
        never = {"0 make 1\n", "1 make 1\n"}
        spare = [prompts.texts[index] for index in prompts.spare(step, num_prompts=6)]
        assert not never & {*whole.prompts, *spare} and not set(whole.prompts) & set(spare)
        assert len({*whole.prompts, *spare}) == 18
        assert not never & set(prompts.batch(step, num_prompts=6, refill=1).prompts)


def test_the_value_model_is_fitted_to_the_prompts_as_they_come(tmp_path):
    prompts = prompt_set(tmp_path, rows_of(*[1] * 30), rows_of(0, *[1] * 28, 9))
    held_out, fitted = held_out_and_fitted(prompts.ids, prompts.order(0), 2)
    assert len(held_out) == len(set(held_out)) == 2 and not set(held_out) & set(fitted)
    assert 0 not in {*held_out, *fitted} and (29 in held_out or fitted.count(29) > 5)


def test_equal_weights_change_no_number_of_a_run(toy_folder, tmp_path):
    file = write(tmp_path / "equal.jsonl", [{"prompt": row["prompt"], "weight": 0.3} for row in toy_task().train])
    settings = {"num_steps": 4, "refill_rounds": 1}
    for name, more in {"plain": {}, "equal": {"prompt_weights": file}}.items():
        toy_trainer(toy_folder, tmp_path / name, **settings, **more).train()
    assert metrics_of(tmp_path / "plain") == metrics_of(tmp_path / "equal")
    assert samples_of(tmp_path / "plain") == samples_of(tmp_path / "equal")


def test_a_killed_run_continues_with_the_prompts_it_would_have_had(toy_folder, tmp_path):
    rows = [{"prompt": row["prompt"], "weight": number} for number, row in enumerate(toy_task().train)]
    file = write(tmp_path / "weights.jsonl", rows)
    run = {"num_steps": 5, "save_every": 1, "refill_rounds": 1, "prompt_weights": file}
    toy_trainer(toy_folder, tmp_path / "whole", **run).train()
    train_until(toy_trainer(toy_folder, tmp_path / "killed", **run), 2)
    write(Path(file), [row | {"weight": 1 + row["weight"]} for row in rows])
    with pytest.raises(ValueError, match=r"the weights of the training prompts differ, because the file of prompt_w"):
        toy_trainer(toy_folder, tmp_path / "killed", **run)
    write(Path(file), [*reversed(rows), {"prompt": "of another data set", "weight": 3}])  # the same weights
    toy_trainer(toy_folder, tmp_path / "killed", **run).train()
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    assert samples_of(tmp_path / "killed") == samples_of(tmp_path / "whole")
    prompts = {sample["prompt"] for sample in samples_of(tmp_path / "whole")}
    assert rows[0]["prompt"] not in prompts and rows[-1]["prompt"] in prompts


# The file


def test_prompts_are_found_whatever_tokenizer_template_and_kind_of_file(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 make 1\n"}]
    filled = [{"content": each["content"], "tool_calls": None, "role": each["role"]} for each in chat]
    data = [{"prompt": chat}, {"prompt": "2 make 1\n"}, {"prompt_ids": [4, 5]}, {"prompt": "4", "prompt_ids": [6]}]
    named = [{"prompt": filled}, {"prompt": "2 make 1\n"}, {"prompt_ids": [4, 5]}, {"prompt": "4"}]
    weights = [row | {"weight": number, "more": "x"} for number, row in enumerate(named, start=1)]
    file = WeightsFile(write(tmp_path / "weights.jsonl", weights[::-1]))
    assert file.of(data, np.arange(4)).values.tolist() == [1, 2, 3, 4]
    assert file.of(data, np.array([3, 1])).values.tolist() == [4, 2]
    (tmp_path / "weights.csv").write_text('prompt,weight\n"2 make 1\n",0.5\n', encoding="utf-16")
    assert WeightsFile(str(tmp_path / "weights.csv")).of(data[1:2], np.arange(1)).values.tolist() == [0.5]


def test_a_prompt_without_a_row_has_the_mean_weight_of_the_others(tmp_path):
    rows = rows_of(1, 2, 6, 9)
    weights = prompt_set(tmp_path, rows_of(*[1] * 6), rows).weights
    assert weights.values.tolist() == [1, 2, 6, 9, 4.5, 4.5]
    assert "2 of 6 have no row in the file and get the mean weight" in weights.said
    assert "0.22 to 2 times on average" in weights.said and "never" not in weights.said
    assert "2 of 4 never come" in prompt_set(tmp_path, rows_of(1, 1, 1, 1), rows_of(0, 0, 1, 1)).weights.said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rows_of(1, 0, -0.5), r"row 3 has weight=-0.5; need a finite number, 0 or more"),
        (rows_of(math.nan), r"row 1 has weight=nan"),
        (rows_of(1, math.inf), r"row 2 has weight=inf"),
        (rows_of(10**400), r"row 1 has weight=1000.*; need a finite number"),
        (rows_of("much"), r"row 1 has weight='much'"),
        (rows_of(True), r"row 1 has weight=True"),
        (rows_of(1, None), r"row 2 has weight=None"),
        ([{"prompt": "a", " weight": 1}], r"row 1 has no `weight`, only prompt,  weight;"),
        ([{"weight": 1}], r"row 1 names no prompt; need `prompt`"),
        ([*rows_of(1), {"prompt": "", "weight": 1}], r"row 2 names no prompt"),
        ([*rows_of(1, 2, 3), *rows_of(1, 2.5)], r"rows 2 and 5 give one prompt the weights 2 and 2.5; .*one of the"),
        (rows_of(0, 0.0), r"all 2 weights are 0, so that no prompt would ever come"),
        ([{"prompt": "of other data", "weight": 1}], r"none of its 1 rows .* 12 prompts; .*'of other data'.*made for"),
        ([{"prompt": "1 1 make 2\n", "weight": 0}, *rows_of(1)], r"all 1 of the run's prompts .* have weight 0"),
        ('{"prompt": "a", "weight": 1}\n{"prompt"\n', r"line 2 is not JSON"),
        ("", r"it has no rows.*Pass --prompt_weights with other data"),
        (b"\xff\xfe\xff", r"it begins with the mark of UTF-16"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_used_is_refused_with_its_row(content, message, toy_folder, tmp_path):
    path = tmp_path / "weights.jsonl"
    if isinstance(content, list):
        write(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"(?s)^prompt_weights={path}: .*{message}"):
        toy_trainer(toy_folder, tmp_path / "run", prompt_weights=str(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "what"), [("no.jsonl", "there is no such file"), ("here.txt", "another kind")])
def test_a_file_that_is_none_of_weights_is_refused(name, what, tmp_path):
    (tmp_path / "here.txt").write_text("a")
    with pytest.raises(ValueError, match=rf"prompt_weights=.*{name}: .*{what}.*--write_pass_rates"):
        WeightsFile(str(tmp_path / name))


# The weight of a pass rate


def test_the_weight_is_largest_where_half_of_the_samples_are_right_and_never_0():
    weights = [weight_of(right, 8) for right in range(9)]
    assert weights == pytest.approx(weights[::-1]) and max(weights) == weights[4] == 0.25
    assert weights[0] == pytest.approx(1 / 18 * 17 / 18) and sorted(weights[:5]) == weights[:5]
    assert torch.isfinite(torch.tensor([weight_of(0, n) for n in (1, 10**6)])).all() and weight_of(0, 10**6) > 0
