"""What a reward function may return: numbers of any library, never text."""

import math
from collections import UserString, deque
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from common.rewards.rules import rule
from common.rewards.scorer import Scorer
from common.rewards.values import LARGEST
from common.tasks import Task
from tests.toy import algorithms, toy_config, toy_task

NUMBERS = {
    "bool": True,
    "int": 1,
    "fraction": Fraction(2, 2),
    "decimal": Decimal("1.0"),
    "numpy bool": np.bool_(True),
    "numpy int": np.int8(1),
    "numpy half": np.float16(1),
    "numpy long double": np.longdouble(1),
    "array without dimensions": np.array(1.0),
    "array of one": np.array([1.0]),
    "object array": np.array(1.0, dtype=object),
    "torch bool": torch.tensor(True),
    "torch bfloat16": torch.tensor(1.0, dtype=torch.bfloat16),
    "torch half of one": torch.tensor([1.0], dtype=torch.float16),
    "with a gradient": torch.ones(1, requires_grad=True).sum(),
    "pandas": pd.Series([1.0]).iloc[0],
}
NO_NUMBERS = {
    "text": "1.0",
    "bytes": b"1.0",
    "buffer": memoryview(b"1.0"),
    "numpy text": np.str_("1.0"),
    "numpy bytes": np.bytes_(b"1.0"),
    "text in an array": np.array("1.0"),
    "text in an object array": np.array("1.0", dtype=object),
    "complex": 1 + 0j,
    "numpy complex": np.complex64(1),
    "torch complex": torch.tensor(1 + 0j),
    "date": np.datetime64("2020-01-01", "ns"),
    "span": np.timedelta64(1, "ns"),
    "missing": pd.NA,
    "not a number": Decimal("NaN"),
    "signalling": Decimal("sNaN"),
    "infinite": np.float32("inf"),
    "beyond float32": np.float64(1e39),
    "two numbers": np.array([1.0, 2.0]),
    "two in a tensor": torch.ones(2),
    "list": [1.0],
    "type": float,
    "masked": np.ma.masked,
    "masked in an array": np.ma.array([1, 2], mask=[0, 1])[1:],
    "user string": UserString("1.0"),
}
BATCHES = {
    "tuple": (1, 0, None),
    "array": np.array([1, 0, 2]),
    "array of objects": np.array([1, 0.0, None], dtype=object),
    "bools": np.array([True, False, True]),
    "half": torch.tensor([1, 0, 2], dtype=torch.float16),
    "bfloat16": torch.tensor([1, 0, 2], dtype=torch.bfloat16),
    "series": pd.Series([1.0, 0.0, 2.0]),
    "series in another order": pd.Series([1, 0, 2], index=[2, 0, 1]),
    "nullable series": pd.Series([1, 0, 2], dtype="Int64"),
    "index": pd.Index([1, 0, 2]),
}
NO_BATCHES = {
    "text": "101",
    "one number": np.float64(1),
    "array without dimensions": np.array(1.0),
    "column": np.ones((3, 1)),
    "tensor column": torch.ones(3, 1),
    "frame": pd.DataFrame({"a": [1, 0, 2]}),
    "set": {1, 2, 3},
    "dict": {0: 1, 1: 0, 2: 2},
    "iterator": iter([1, 0, 2]),
    "deque": deque([1, 0, 2]),
}


def score(returned: object, *, num_rows: int, is_rule: bool = False) -> list[float]:
    def mine(prompts, completions, **columns):
        return returned

    scorer = Scorer({"mine": rule(mine) if is_rule else mine}, {"mine": 1.0})
    return scorer(["p"] * num_rows, ["c"] * num_rows, {})[1]["mine"].tolist()


def test_a_number_of_any_library_is_a_reward():
    def named(prompts, completions, **columns):
        return [NUMBERS[name] for name in completions]

    scorer = Scorer({"function": named, "rule": rule(partial(named))}, {"function": 1.0, "rule": 1.0})
    _, parts = scorer(["p"] * len(NUMBERS), list(NUMBERS), {})
    assert parts["function"].tolist() == parts["rule"].tolist() == [1.0] * len(NUMBERS)


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_finite_real_number_is_refused_even_if_float_would_take_it(name):
    with pytest.raises(
        ValueError, match=r"(?s)reward 'mine' returned .* in row 1 for 'c': need a finite.*return None"
    ):
        score([0.0, NO_NUMBERS[name]], num_rows=2)


@pytest.mark.parametrize("name", ["text", "infinite"])
def test_of_a_rule_it_is_refused_too(name):
    with pytest.raises(ValueError, match=r"'mine' raised TypeError: returned .* for 1 completion, not a finite"):
        score([NO_NUMBERS[name]], num_rows=1, is_rule=True)


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_may_be_anything_with_one_dimension_in_its_own_order(name):
    *first, last = score(BATCHES[name], num_rows=3)
    assert first == [1.0, 0.0] and (last in (1.0, 2.0) or (math.isnan(last) and BATCHES[name][2] is None))


@pytest.mark.parametrize("name", NO_BATCHES)
def test_what_is_no_list_of_one_value_per_row_is_refused(name):
    with pytest.raises(ValueError, match=r"(?s)reward 'mine' returned .* for 3 completions: need a list with"):
        score(NO_BATCHES[name], num_rows=3)


def test_a_rule_may_answer_its_row_with_an_array_too():
    assert score(pd.Series([1.0], index=[7]), num_rows=1, is_rule=True) == [1.0]


def test_a_missing_number_of_a_series_is_no_none():
    """pandas makes NaN of None; whoever means None says so."""
    with pytest.raises(ValueError, match=r"returned nan in row 1.*return None"):
        score(pd.Series([1.0, None]), num_rows=2)


@pytest.mark.parametrize("is_rule", [False, True])
def test_a_masked_value_is_neither_the_number_below_the_mask_nor_zero(is_rule):
    rows = 1 if is_rule else 2  # a rule answers one row
    with pytest.raises(ValueError, match=r"'mine' .*returned masked"):
        score(np.ma.array([1, 2], mask=[0, 1])[2 - rows :], num_rows=rows, is_rule=is_rule)


@pytest.mark.slow
@pytest.mark.parametrize("name", algorithms())
def test_every_algorithm_computes_with_the_largest_rewards(name, toy_folder, tmp_path):
    """No square, sum or deviation of them is beyond float32."""

    def extreme(completions, **columns):
        return [LARGEST * (-1) ** row for row in range(len(completions))]

    task = Task(train=toy_task().train, rewards={"extreme": extreme})
    config = toy_config(toy_folder, tmp_path / "run", algorithm=name)
    metrics = algorithms()[name].trainer(config, task=task).train()
    assert metrics["policy/grad_norm"] > 0 and all(map(math.isfinite, metrics.values()))
