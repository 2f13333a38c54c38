"""docs/recipes.md: its seconds by hand-worked numbers, its lines as its command writes them, what measures them."""

import json
import math
import re
import sys
import time
from argparse import Namespace
from dataclasses import replace

import pytest

from benchmarks import estimates, recipes
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import recipe as measuring
from benchmarks.gpu.stand_in import score, write_prompts
from common.cli import parse_config, parse_settings
from common.evaluation.settings import EvaluationSettings
from common.memory import constants
from common.memory.cards import Rates, card, rates
from common.memory.seconds import Operations, Tokens, sampling, step_seconds, tokens_of_passes
from tools import recipes as tool

COUNTDOWN = "countdown-3b"
A100 = rates("a100")


@pytest.fixture(scope="module")
def countdown():
    return recipes.planned(COUNTDOWN, 80)


# Cards


def test_cards_are_known_by_what_their_drivers_call_them():
    assert rates("NVIDIA GeForce RTX 4090") == rates("4090") and rates("NVIDIA H100 80GB HBM3") == rates("h100")
    assert rates("NVIDIA A100-SXM4-40GB") == rates("a100-40gb") != rates("NVIDIA A100-SXM4-80GB") == A100
    assert card("NVIDIA GeForce RTX 4090").total == card("4090").total


@pytest.mark.parametrize("name", ["24gb", "t4", "NVIDIA H100 PCIe", ""])
def test_a_card_whose_speed_is_not_known_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match=r"bandwidth.*4090.*h100"):
        rates(name)


# The arithmetic


def test_a_forward_pass_costs_two_operations_for_each_weight_and_four_for_each_feature_that_is_seen(countdown):
    operations = Operations.of(countdown.plan.cast.sizes)
    # The tied embedding is the head, which only tokens that are predicted go through.
    assert operations.body + operations.head == 2 * (3085938688 - 151936 * 2048 + 151936 * 2048)
    assert operations.attention == 4 * 36 * 2048
    assert operations.forward(10, 1, 5) == 10 * (operations.body + 5 * operations.attention) + operations.head


def test_with_a_place_for_everyone_there_are_as_many_rounds_as_the_longest_has_tokens(countdown):
    tokens = Tokens(prompts=16, generations=4, prompt=0, completion=100, longest=100)
    free = Rates(bandwidth=1e12, flops=1e30, flops_float32=1e30, link=1, source="")
    found = sampling(countdown.config, countdown.plan, free, tokens).seconds
    weights, cache = 100 * 2 * 3085938688, 6400 * 50 * 36864
    assert found == pytest.approx((weights + cache) / 0.6e12 + 100 * constants.DECODING_ROUND)


def test_with_fewer_places_the_others_wait(countdown):
    tokens = Tokens(prompts=16, generations=4, prompt=140, completion=400, longest=1024)
    half = replace(countdown.config, vllm_max_num_seqs=32)
    rounds = [
        int(sampling(config, countdown.plan, A100, tokens).how.split(" rounds")[0].replace(",", ""))
        for config in (countdown.config, half)
    ]
    assert rounds == [1024, 64 * 400 // 32 + 1024]


def test_all_weights_take_eight_operations_and_an_adapter_six(countdown):
    tokens, config = countdown.recipe.tokens(countdown.config), countdown.config
    slow = Rates(bandwidth=1e30, flops=1e12, flops_float32=1e12, link=1e30, source="")
    through = tokens_of_passes(countdown.plan, tokens)
    forward = Operations.of(countdown.plan.cast.sizes).forward(through, tokens.sampled, 270)

    def passes(**settings):
        changed = replace(config, **settings)
        return step_seconds(changed, countdown.plan, slow, tokens)["update"].seconds * 0.35e12 / forward

    assert passes() == pytest.approx(4)
    assert passes(gradient_checkpointing=False) == pytest.approx(3)
    adapter = 8 * sum(countdown.plan.cast.sizes.adapter) * through / forward  # 2 for each of its weights and pass
    assert passes(use_lora=True) == pytest.approx(3 + adapter)
    assert passes(num_update_epochs=2) == pytest.approx(8)


def test_a_prompt_is_read_once_for_its_group_where_packed_rows_pay(countdown):
    few, many = (Tokens(prompts=2, generations=4, prompt=n, completion=100, longest=100) for n in (20, 1000))
    assert tokens_of_passes(countdown.plan, few) == 2 * 4 * 120
    assert tokens_of_passes(countdown.plan, many) == 2 * (1000 + 4 * 99)


def test_a_faster_card_is_never_slower_and_longer_completions_never_faster():
    for name in (COUNTDOWN, "gsm8k-3b-4bit", "math-1.5b-8k"):
        steps = [estimates.estimate(name, *each).step for each in ((80, "a100-80gb"), (80, "h100"))]
        assert steps[0] > steps[1] > 0
        found = estimates.estimate(name, 24, "4090")
        assert found.longest > found.step and found.hours > found.planned.config.num_steps * found.step / 3600


def test_what_moves_costs_its_bytes_over_the_link(countdown):
    moving = replace(countdown.plan, choices=replace(countdown.plan.choices, offload="always"))
    found = step_seconds(countdown.config, moving, A100, countdown.recipe.tokens(countdown.config))
    weights = 4 * 3085938688
    assert found["push"].seconds == pytest.approx(weights / 25e9)
    # Weights and both moments arrive and leave, and the engine's weights go and come back.
    assert found["offload"].seconds == pytest.approx((2 * 3 * weights + 2 * weights / 2) / 25e9)


# The page


def test_the_page_is_what_its_command_writes():
    page = tool.PAGE.read_text(encoding="utf-8")
    for name in (COUNTDOWN, "gsm8k-3b-4bit", "math-1.5b-8k"):
        assert "\n".join(tool.section(name)) in page
    assert "\n".join(tool.assumptions()) in page
    assert [f"### {name}\n" in page for name in recipes.RECIPES] == [True] * 4


@pytest.mark.slow
def test_the_whole_page_is_what_its_command_writes():
    assert tool.page() == tool.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_commands_of_the_page_are_read_by_their_scripts(name):
    recipe = recipes.RECIPES[name]
    assert (recipes.ROOT / recipe.folder / recipe.script).is_file()
    config = recipes.settings(name)
    assert config.sampler == "vllm" and recipe.shape in config.model
    assert recipe.completion < config.max_completion_length and recipe.prompt < config.max_prompt_length


def test_what_does_not_fit_is_changed_as_the_plan_says():
    found = recipes.planned(COUNTDOWN, 24)
    assert found.plan.fits and "needs 60" in found.refused
    assert found.more == ("--optimizer", "adamw_host") and f"Pass {' '.join(found.more)}" in found.refused
    assert found.command.endswith("Qwen/Qwen2.5-3B --optimizer adamw_host")


def test_a_measured_recipe_says_so_in_its_line():
    found = {"recipe": COUNTDOWN, "rates": "h100", "gigabytes": 80, "gpu": "NVIDIA H100", "weights": "hub"}
    found |= {"prompts": 8, "length": 350.2, "seconds": {"step": 6.0}}
    lines = [estimates.row(COUNTDOWN, 80, name, [found]) for name in ("a100-80gb", "h100")]
    assert lines[0].endswith("| computed, not measured |")
    # Half of the prompts in 6 s: a step takes 12, and 1000 of them 3.3 hours.
    assert "measured: 12 s a step, 3.3 h, hub weights, 350 tokens each, from 8 of 16 prompts; NVIDIA H100" in lines[1]


# What others report

LITERATURE = (recipes.ROOT / "docs" / "literature.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:cd (\S+) && )?python (-m )?(\S+) (.*)$", LITERATURE, re.MULTILINE)


@pytest.mark.parametrize("place", range(len(COMMANDS)))
def test_the_commands_beside_published_numbers_are_read_by_their_scripts(place):
    folder, _, name, words = COMMANDS[place]
    if name == "common.evaluation":
        assert parse_settings(EvaluationSettings, words.split()).task in ("gsm8k", "math500", "aime24")
    elif name in ("compare_algorithms.py", "reward_model.py"):
        assert (recipes.ROOT / folder / name).is_file()
    else:
        script = recipes._script(recipes.ROOT / folder / name)
        arguments = [*words.split(), "--preset", "none"]
        config = parse_config(script.SETTINGS, script=script.__file__, args=arguments)
        assert config.max_completion_length >= 1024


def test_no_number_is_shown_without_its_source():
    rows = [line for line in LITERATURE.splitlines() if re.match(r"\| (?!source|-)", line)]
    assert len(rows) > 20
    named = ("](", "the same", "DeepSeekMath", "Tülu 3")
    assert not [row for row in rows if not any(word in row.split("|")[1] for word in named)]


# What measures


def options(**given):
    defaults = {"recipe": COUNTDOWN, "minutes": 10, "weights": "random", "card": None, "shape": "mini"}
    return Namespace(**defaults | {"prompts": None, "length": 16, "sampler": "transformers"} | given)


def test_random_weights_get_all_settings_of_the_recipe_by_name(tmp_path):
    found = recipes.planned("math-1.5b-8k", 80)
    words = measuring._command(options(), found, 3, tmp_path)[2:]
    script = recipes._script(recipes.ROOT / found.recipe.folder / found.recipe.script)
    config = parse_config(script.SETTINGS, script=script.__file__, args=words)
    assert (config.prompts_per_step, config.max_completion_length, config.eval_every) == (3, 16, 0)
    assert config.task == "prompts" and config.reward_weights is None
    same = ("num_generations", "learning_rate", "average_over", "sparse", "kl_coef", "optimizer", "num_steps")
    assert [vars(config)[name] for name in same] == [vars(found.config)[name] for name in same]


def test_a_recipe_from_the_hub_is_its_own_command_with_what_the_card_needs(tmp_path):
    found = recipes.planned(COUNTDOWN, 24)
    words = measuring._command(options(weights="hub", sampler=None), found, 16, tmp_path)[1:]
    assert words[:5] == ["grpo_r1.py", *found.recipe.words, *found.more]
    config = recipes._script(recipes.ROOT / found.recipe.folder / words[0]).parse([*words[1:], "--preset", "none"])
    assert (config.optimizer, config.prompts_per_step, config.task) == ("adamw_host", 16, "countdown")


def test_a_step_that_is_too_long_for_the_time_gets_fewer_prompts():
    place = measuring.Place(gpu="x", rated="4090", gigabytes=24)
    found = recipes.planned("math-1.5b-8k", 24)
    few, all_of_them = (measuring._prompts(found, place, 60 * minutes) for minutes in (10, 100))
    assert 20 < few < 64 and all_of_them == 128
    assert measuring._prompts(found, replace(place, rated=None), 600) == 128


def test_a_run_ends_when_enough_steps_are_done(tmp_path):
    code = (
        "import json, pathlib, time\nrun = pathlib.Path('run'); run.mkdir()\n"
        "file = (run / 'metrics.jsonl').open('a')\n"
        "for step in range(100):\n    file.write(json.dumps({'step': step, 'time/step': 1.0, 'length': 2}) + '\\n')\n"
        "    file.flush(); time.sleep(0.05 if step < 8 else 100)\n"
    )
    start = time.monotonic()
    steps = measuring._run([sys.executable, "-c", code], tmp_path, tmp_path / "run", start + 60)
    assert time.monotonic() - start < 30
    assert [each["step"] for each in steps] == list(range(1, len(steps) + 1)) and len(steps) > measuring.STEPS


def test_a_script_that_fails_is_shown_with_what_it_said(tmp_path):
    with pytest.raises(measuring.subprocess.CalledProcessError) as error:
        measuring._run([sys.executable, "-c", "exit('no such model')"], tmp_path, tmp_path / "run", math.inf)
    assert error.value.returncode == 1 and error.value.stderr == "no such model"


def test_prompts_of_random_tokens_have_the_assumed_length_and_scores_differ(tmp_path):
    path = write_prompts(tmp_path / "prompts.jsonl", tokens=160, vocabulary=100)
    rows = [json.loads(line)["prompt_ids"] for line in path.read_text().splitlines()]
    assert 155 < sum(map(len, rows)) / len(rows) < 165 and max(map(max, rows)) < 100
    scores = score(["a", "b", "a"], prompts=["x"] * 3)
    assert scores[0] == scores[2] != scores[1] and all(0 <= each <= 1 for each in scores)


def test_what_is_measured_is_kept_beside_what_is_there(tmp_path):
    path = tmp_path / "results" / "recipes.json"
    measuring.keep({"recipe": "a"}, path)
    assert json.loads(path.read_text()) == [{"recipe": "a"}]


def test_a_card_that_is_not_known_and_a_length_without_random_weights_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--recipe", COUNTDOWN, "--card", "foo"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1 and re.search(r"card foo: .*4090", capsys.readouterr().err)
    monkeypatch.setattr(sys, "argv", ["gpu", "--recipe", COUNTDOWN, "--length", "16"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--weights random" in capsys.readouterr().err
