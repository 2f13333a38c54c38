"""Runs with drawn settings, in which as many pairs of values as possible meet: see tests/covering.py."""

import random
from dataclasses import fields

import pytest

from tests.covering import FIXED, Draws, broken, pairs_of, values_of
from tests.toy import algorithms, facts

# Of settings that are allowed, but not exact.
pytestmark = pytest.mark.filterwarnings("ignore:sparse with kl_coef")

NAMES = list(algorithms())
RUNS = 5


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_drawn_or_said_to_be_fixed(name):
    settings = {field.name for field in fields(algorithms()[name].config)}
    made = {setting for setting, value in facts(name).get("TOY_SETTINGS", {}).items() if callable(value)}
    assert settings == values_of(name).keys() | FIXED | made and not values_of(name).keys() & (FIXED | made)


def test_draws_are_a_function_of_the_seed_and_bring_pairs_that_have_not_met():
    draws, again = Draws("GRPO", 0), Draws("GRPO", 0)
    first, second = draws.next(), draws.next()
    assert [again.next(), again.next()] == [first, second]
    assert draws.met == pairs_of(first) | pairs_of(second) and len(draws.met) > 1.5 * len(pairs_of(first))
    assert Draws("GRPO", 1).next() != first


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_whatever_settings_meet_a_run_holds_what_every_run_must(name, toy_folder, tmp_path):
    draws = Draws(name, 0)
    for number in range(RUNS):
        settings = draws.next()
        found = broken(name, settings, toy_folder, tmp_path / str(number), random.Random(number))
        assert not found, f"run {number}, {settings}"
