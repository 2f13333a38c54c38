"""``python -m common.evaluation``: what training measures, complete folders that are never overwritten, one table."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.cli import parse_settings
from common.embedded.policy import TinySettings, build_policy, build_tokenizer, save_untrained, train_policy
from common.evaluation import command, results
from common.evaluation.command import Evaluation, evaluate
from common.evaluation.results import table
from common.evaluation.sets import NAMED_SETS, find_set, load_problems
from common.evaluation.settings import EvaluationSettings
from common.evaluation.unfinished import Unfinished
from common.merge import MergeSettings, merge
from common.sampling.torch_sampler import TransformersSampler
from common.tasks import math
from common.tasks.countdown import problems
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from tests import forked

ROOT = Path(__file__).parent.parent
RECORDS = ROOT.parent / "shared" / "data"

# As a chat model's, in one line.
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
# Heads of 32, which vLLM on the CPU asks for.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
RESULT = ("outputs.jsonl", "score.json", "table.md")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A policy that has learned enough in seconds to solve a few problems."""
    folder = tmp_path_factory.mktemp("models") / "learned"
    settings = TinySettings(**{**SIZES, "intermediate_size": 128}, **HEADS, num_lessons=2000)
    policy = build_policy(settings)
    train_policy(policy, settings)
    policy.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Each test begins in an empty folder, and must not reach for the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The models whose weights were loaded."""
    loaded, load = [], command.load
    monkeypatch.setattr(
        command, "load", lambda source, **options: (loaded.append(source.base), load(source, **options))[1]
    )
    return loaded


def settings(*models: Path | str, **changes: object) -> EvaluationSettings:
    """A small evaluation on Countdown without vLLM, unless `changes` say otherwise."""
    defaults = {"task": "countdown", "sampler": "transformers", "num_problems": 6, "num_samples": 2}
    defaults |= {"max_completion_length": 24}
    return EvaluationSettings(model=[str(model) for model in models], **defaults | changes)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def result_of(folder: Path) -> tuple[dict, list[dict]]:
    lines = (folder / "outputs.jsonl").read_text().splitlines()
    return json.loads((folder / "score.json").read_text()), [json.loads(line) for line in lines]


def texts_of(folder: Path) -> list[str]:
    return [completion["text"] for row in result_of(folder)[1] for completion in row["completions"]]


def files() -> list[str]:
    return sorted(str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*") if path.is_file())


# One code


@pytest.mark.slow
def test_the_final_model_of_a_run_measures_what_the_run_measured(model, tmp_path):
    config = GRPOConfig(
        model=str(model), task="countdown", num_steps=1, prompts_per_step=2, num_generations=4, num_eval_prompts=128,
        eval_num_samples=4, eval_temperature=0.8, eval_top_p=0.9, max_prompt_length=16, max_completion_length=100,
        sampler="transformers", save_every=0, seed=3, output_dir=str(tmp_path / "run"), progress=False,
    )  # fmt: skip
    GRPOTrainer(config).train()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    same = {"num_problems": 128, "num_samples": 4, "temperature": 0.8, "top_p": 0.9, "max_completion_length": 100}
    (score,) = evaluate(settings(tmp_path / "run" / "final", **same, seed=3))
    names = ("score", "length", "truncated", "format", "accuracy", "pass@2", "pass@4")
    assert {name: score[name] for name in names} == {name: line[f"eval/{name}"] for name in names}
    assert score["accuracy"] > 0 and score["format"] > 0
    low, high = score["accuracy_ci95"]
    assert low == 0 or (high - low) / 2 == pytest.approx(line["eval/accuracy_ci95"])
    (of_run,) = evaluate(settings(tmp_path / "run", **same, seed=3))
    assert {name: of_run[name] for name in names} == {name: score[name] for name in names}


# The folder


def test_score_and_outputs_agree(model):
    (score,) = evaluate(settings(model, num_problems=None, num_samples=4, max_completion_length=100))
    (folder,) = Path("evaluations").iterdir()
    assert files() == [f"{folder}/{name}" for name in ("outputs.jsonl", "score.json", "table.md")]
    stored, rows = result_of(folder)
    assert stored == score and len(rows) == score["num_problems"] == 256
    completions = [completion for row in rows for completion in row["completions"]]
    assert len(completions) == 256 * 4

    def mean(values):
        return sum(values) / len(values)

    assert score["accuracy"] == mean([c["correct"] for c in completions]) > 0
    assert score["pass@4"] == mean([any(c["correct"] for c in row["completions"]) for row in rows])
    assert score["accuracy"] <= score["pass@2"] <= score["pass@4"]
    assert score["length"] == mean([c["length"] for c in completions])
    assert score["truncated"] == mean([c["truncated"] for c in completions])
    assert score["format"] == mean([c["parts"]["format"] == 1 for c in completions])
    assert score["score"] == pytest.approx(mean([c["score"] for c in completions]))
    assert all(c["correct"] == (c["parts"]["equation"] == 1) for c in completions)
    assert score["tokens"] == sum(c["length"] for c in completions)
    assert score["tokens_per_second"] == pytest.approx(score["tokens"] / score["seconds"]["sample"])
    assert [row["problem"] for row in rows] == list(range(256))
    assert [{"nums": row["nums"], "target": row["target"]} for row in rows] == problems()[1]
    assert rows[0]["prompt"] == f"{' '.join(map(str, rows[0]['nums']))} make {rows[0]['target']}\n"
    assert "torch" in score["versions"] and score["settings"]["temperature"] == 0.6


def test_the_same_command_shows_what_is_there_without_loading_the_model(model, loads, caplog):
    first = evaluate(settings(model))
    before = {name: Path(name).read_bytes() for name in files()}
    with caplog.at_level("INFO", "nanorlhf"):
        assert evaluate(settings(model)) == first
        # Memory changes no result.
        assert evaluate(settings(model, vllm_memory_share=0.2, vllm_max_num_seqs=7)) == first
    assert len(loads) == 1 and "already evaluated" in caplog.text
    assert {name: Path(name).read_bytes() for name in files()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7},
        {"seed": 1},
        {"top_p": 0.5},
        {"top_k": 3},
        {"num_samples": 3},
        {"num_problems": 5},
        {"max_completion_length": 25},
        {"max_prompt_length": 9},
        {"dtype": "bfloat16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_have_another_folder_and_leave_this_one_alone(tiny_folder, changes, tmp_path):
    one, other = Evaluation(settings(tiny_folder)), Evaluation(settings(tiny_folder, **changes))
    assert one.folder != other.folder and one.folder.parent == other.folder.parent == Path("evaluations")
    evaluate(settings(tiny_folder, output_dir="here"))
    before = (tmp_path / "here" / "score.json").read_bytes()
    with pytest.raises(ValueError, match=rf"output_dir=here: .*{next(iter(changes))}.*Pass another --output_dir"):
        evaluate(settings(tiny_folder, output_dir="here", **changes))
    assert (tmp_path / "here" / "score.json").read_bytes() == before


def test_other_weights_in_the_same_place_are_another_model(tiny_folder, loads, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    evaluate(settings(tmp_path / "model"))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(-1)
    policy.save_pretrained(tmp_path / "model")
    evaluate(settings(tmp_path / "model"))
    assert len(loads) == 2
    first, second = (texts_of(folder) for folder in Path("evaluations").iterdir())
    assert first != second


def test_other_problems_in_the_same_file_are_another_evaluation(tiny_folder):
    path = write(Path("mine.jsonl"), problems()[1][:6])
    one = Evaluation(settings(tiny_folder, task=path))
    write(Path("mine.jsonl"), problems()[1][6:12])
    other = Evaluation(settings(tiny_folder, task=path))
    assert one.folder.name.startswith(f"{tiny_folder.parent.name}-{tiny_folder.name}-mine-")
    assert one.folder != other.folder


def test_a_folder_with_something_else_is_not_touched(tiny_folder, loads, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.md").write_text("all of it")
    with pytest.raises(ValueError, match=r"output_dir=thesis: .* no score.json.*Pass another --output_dir"):
        evaluate(settings(tiny_folder, output_dir="thesis"))
    assert files() == ["thesis/chapter.md"] and not loads
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    evaluate(settings(tiny_folder, output_dir="link"))
    assert "empty/score.json" in files() and (tmp_path / "link").is_symlink()


def test_columns_with_the_names_of_outputs_are_kept_beside_them(tiny_folder):
    path = Path("mine.jsonl")
    write(path, [{"prompt": f"{i} make\n", "problem": f"p{i}", "completions": i} for i in range(6)])
    Path("rewards.py").write_text("def ones(completions):\n    return [1.0] * len(completions)\n")
    own = {"task": "prompts", "dataset": str(path), "rewards": ["rewards.py:ones"], "output_dir": "out"}
    with pytest.raises(ValueError, match="completions"):
        evaluate(settings(tiny_folder, **own))
    write(path, [{"prompt": f"{i} make\n", "problem": f"p{i}"} for i in range(6)])
    evaluate(settings(tiny_folder, **own))
    rows = result_of(Path("out"))[1]
    assert [(row["problem"], row["problem_column"]) for row in rows] == [(i, f"p{i}") for i in range(6)]


def test_prompts_that_rewards_see_beside_token_ids_are_part_of_an_evaluation(tiny_folder):
    Path("rewards.py").write_text("def ones(completions):\n    return [1.0] * len(completions)\n")
    folders = set()
    for text in ("one", "two"):
        path = write(Path("mine.jsonl"), [{"prompt_ids": [5, 6], "prompt": text}] * 2)
        own = {"task": "prompts", "dataset": path, "rewards": ["rewards.py:ones"], "num_problems": None}
        folders.add(Evaluation(settings(tiny_folder, **own)).folder)
    assert len(folders) == 2


def test_what_ends_midway_leaves_no_part_of_a_result(tiny_folder, monkeypatch):
    def full(scores):
        raise OSError("no space left on device")

    monkeypatch.setattr(results, "table", full)
    with pytest.raises(OSError, match="no space"):
        evaluate(settings(tiny_folder))
    assert [name.endswith(".unfinished.jsonl") for name in files()] == [True]  # the completions are kept
    assert len(list(Path("evaluations").iterdir())) == 1


# Interrupted


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """How many prompts each call of the sampler was asked to complete."""
    counts, generate = [], TransformersSampler.generate

    def counted(self, prompt_ids, *args, **kwargs):
        counts.append(len(prompt_ids))
        return generate(self, prompt_ids, *args, **kwargs)

    monkeypatch.setattr(TransformersSampler, "generate", counted)
    return counts


@pytest.fixture
def interrupted_after(monkeypatch):
    """A function: evaluate, and press Ctrl-C when the completions of so many problems are there."""
    add = Unfinished.add

    def interrupt(number: int, chosen: EvaluationSettings) -> Path:
        def stop(self, *args):
            if len(self.completions) == number:
                raise KeyboardInterrupt
            add(self, *args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Unfinished, "add", stop)
            evaluate(chosen)
        (path,) = Path.cwd().rglob("*.unfinished.jsonl")
        return path

    return interrupt


def without_times(score: dict) -> dict:
    return {name: value for name, value in score.items() if name not in ("seconds", "tokens_per_second")}


def test_an_interrupted_evaluation_goes_on_with_the_missing_problems_and_ends_as_if_it_had_not_been(
    model, interrupted_after, sampled, caplog
):
    chosen = settings(model, num_problems=40, num_samples=4, max_completion_length=60)
    (whole,) = evaluate(replace(chosen, output_dir="whole"))
    with caplog.at_level("INFO", "nanorlhf"):
        path = interrupted_after(15, chosen)
    assert f"the completions of 15 of 40 problems are kept in {path.relative_to(Path.cwd())}" in caplog.text
    assert len(files()) == 1 + 3 and not list(Path("evaluations").glob("*/"))
    interrupted_after(17, chosen)
    (score,) = evaluate(chosen)
    assert sampled == [40, 40, 25, 23]
    (folder,) = Path("evaluations").iterdir()
    assert (folder / "outputs.jsonl").read_bytes() == Path("whole/outputs.jsonl").read_bytes()
    assert without_times(score) == without_times(whole) and score["accuracy"] > 0


def test_what_a_reader_of_the_kept_completions_sees(tiny_folder, interrupted_after):
    lines = [json.loads(line) for line in interrupted_after(2, settings(tiny_folder)).read_text().splitlines()]
    assert lines[0]["task"] == "countdown" and lines[0]["temperature"] == 0.6
    assert [line["problem"] for line in lines[1:]] == [0, 1]
    evaluate(settings(tiny_folder))
    (folder,) = Path("evaluations").iterdir()
    texts = [[each["text"] for each in row["completions"]] for row in result_of(folder)[1]]
    assert [[each["text"] for each in line["completions"]] for line in lines[1:]] == texts[:2]


def test_a_line_that_a_kill_cut_off_is_sampled_again(tiny_folder, interrupted_after, sampled):
    path = interrupted_after(3, settings(tiny_folder))
    path.write_bytes(path.read_bytes()[:-40])
    interrupted_after(5, settings(tiny_folder))
    evaluate(settings(tiny_folder))
    assert sampled == [6, 4, 1]


def test_lines_that_a_power_cut_spoiled_are_sampled_again(tiny_folder, interrupted_after, sampled):
    path = interrupted_after(3, settings(tiny_folder))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"\0" * 90 + b"\n", lines[3]]))
    interrupted_after(3, settings(tiny_folder))
    path.write_bytes(b"\n")
    evaluate(settings(tiny_folder))
    assert sampled == [6, 4, 6] and not path.exists()


def test_when_all_is_sampled_only_the_scores_are_missing(tiny_folder, monkeypatch, sampled):
    def broken(*args):
        raise OSError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="out of memory"):
        patch.setattr(command, "judge", broken)
        evaluate(settings(tiny_folder))
    (score,) = evaluate(settings(tiny_folder))
    assert sampled == [6] and score["tokens_per_second"] > 0


def test_another_evaluation_does_not_take_the_completions_of_this_one(tiny_folder, interrupted_after, sampled):
    path = interrupted_after(3, settings(tiny_folder, output_dir="here"))
    before = path.read_bytes()
    other = shutil.copytree(tiny_folder, "other/" + "/".join(tiny_folder.parts[-2:]))  # the same name
    for changes in ({"temperature": 0.7}, {"seed": 1}, {"num_problems": 5}, {"max_completion_length": 25}, {}):
        evaluate(settings(tiny_folder if changes else other, output_dir=f"there-{len(sampled)}", **changes))
    assert path.read_bytes() == before and sampled == [6, 6, 6, 5, 6, 6]
    evaluate(settings(tiny_folder, output_dir="here", vllm_memory_share=0.2))
    assert sampled[-1] == 3 and not path.exists()


def test_completions_of_other_settings_in_the_same_file_are_refused(tiny_folder, interrupted_after, loads):
    path = interrupted_after(3, settings(tiny_folder))
    path.write_bytes(path.read_bytes().replace(b'"temperature": 0.6', b'"temperature": 0.7', 1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"unfinished evaluation that differs from this one in temperature.*Delete"):
        evaluate(settings(tiny_folder))
    assert path.read_bytes() == before and len(loads) == 1


def test_an_evaluation_that_another_process_is_working_on_is_refused(tiny_folder):
    evaluation = Evaluation(settings(tiny_folder, output_dir="here"))
    hold = (
        "import pathlib, sys; from common.evaluation.unfinished import Unfinished\n"
        "with Unfinished(pathlib.Path(sys.argv[1]), {}): print('held', flush=True); sys.stdin.read()"
    )
    command_line = [sys.executable, "-c", hold, str(evaluation.unfinished.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command_line, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is sampling the same completions"):
            evaluation.run()
        process.stdin.close()
    evaluation.run()


@pytest.mark.slow
def test_a_killed_command_goes_on_when_it_is_typed_again(model):
    arguments = ["--task", "countdown", "--sampler", "transformers", "--max_completion_length", "120"]
    words = ["-m", "common.evaluation", "--model", model, *arguments, "--output_dir"]
    there = 0
    for sign, status in (("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)):
        with forked.Forked([*words, "killed"]) as process:
            while (kept := num_kept()) < there + 20:
                assert process.poll(0.02) is None, process.stderr
            process.send_signal(getattr(signal, sign))
            done = process.wait()
        assert done.returncode == status and not Path("killed").exists()
        assert num_there(done) == there
        if sign != "SIGKILL":
            name = "interrupted" if sign == "SIGINT" else sign
            said = re.search(
                r"completions of (\d+) of 256 problems are kept in \S+-countdown-\w+.unfinished", done.stderr
            )
            assert int(said[1]) == num_kept() >= kept - 1  # of the last line a part may have been there
            assert done.stderr.endswith(f"{name}: the same command continues with what is missing\n")
        there = num_kept()
    again, whole = (forked.run([*words, folder]) for folder in ("killed", "whole"))
    assert num_there(again) in (there, there - 1)  # the last line may have been cut off
    assert again.returncode == whole.returncode == 0
    assert Path("killed/outputs.jsonl").read_bytes() == Path("whole/outputs.jsonl").read_bytes()
    assert files() == [f"{folder}/{name}" for folder in ("killed", "whole") for name in sorted(RESULT)]


def num_there(done: subprocess.CompletedProcess) -> int:
    """Problems whose completions a command says it has found."""
    said = re.search(r"sampling 256 x 8 completions(?:, (\d+) of which are there)?\n", done.stderr)
    return int(said[1] or 0) // 8


def num_kept() -> int:
    """Problems whose completions lie in the file of an unfinished evaluation, below its first line."""
    return sum(len(kept.read_bytes().splitlines()) - 1 for kept in Path().glob("*.unfinished.jsonl"))


# The table


@pytest.mark.slow
def test_two_models_are_one_table(tiny_folder, model, loads):
    evaluate(settings(model, output_dir=None))
    scores = evaluate(settings(model, tiny_folder))
    for score in scores:  # the second model solves nothing
        low, high = score["accuracy_ci95"]
        assert 0 <= low <= score["accuracy"] <= high <= 1
    assert loads == [str(model), str(tiny_folder)]  # the first one's result was there
    assert [score["model"] for score in scores] == [str(model), str(tiny_folder)]
    (file,) = Path("evaluations").glob("table-countdown-*.md")
    assert file.read_text() == table(scores)
    rows = [line for line in file.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1
    evaluate(settings(model, tiny_folder, output_dir="both"))
    assert Path("both/table.md").is_file() and len(list(Path("both").glob("*/score.json"))) == 2


def test_the_table_by_hand():
    score = {
        "model": "base", "adapter": None, "task": "aime24", "num_problems": 30, "num_samples": 4, "accuracy": 0.25,
        "accuracy_ci95": [0.1, 0.4], "pass@2": 0.3, "pass@4": 0.5, "format": 1.0, "length": 12.34, "truncated": 0.125,
        "tokens_per_second": 99.6, "num_too_long": 0, "num_left_out": 0,
        "settings": {"temperature": 0.6, "top_p": 1.0, "top_k": 0, "seed": 0, "max_completion_length": 4096},
    }  # fmt: skip
    lines = table([score, score | {"adapter": "mine", "num_too_long": 3}]).splitlines()
    assert lines[0] == "aime24: 30 problems x 4 completions, temperature 0.6, top_p 1.0, top_k 0, seed 0"
    assert lines[1:3] == ["base: without 3 rows whose prompt is longer", ""]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:]]
    assert cells[0][:6] == ["model", "accuracy", "95 % interval", "pass@2", "pass@4", "format"]
    assert cells[0][6:] == ["length", "truncated", "limit", "tokens/s"] and set(cells[1]) == {"---"}
    numbers = ["0.250", "0.100 to 0.400", "0.300", "0.500", "1.000", "12.3", "0.125", "4096", "100"]
    assert cells[2:] == [["base", *numbers], ["base + mine", *numbers]]


@pytest.mark.slow
def test_vllm_samples_two_models_what_transformers_samples(model, tmp_path):
    """Greedy completions, so that the two can be compared; as a user starts it, from another folder."""
    other = save_untrained(tmp_path / "other", **SIZES, **HEADS, initializer_range=0.2)
    arguments = ["--task", "countdown", "--temperature", "0", "--num_problems", "6", "--max_completion_length", "24"]
    command_line = [sys.executable, "-m", "common.evaluation", "--model", str(model), str(other), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| /") == 2 and "6 problems x 1 completions" in done.stdout
    assert done.stderr.count("written to") == 2
    for one in (model, other):
        evaluate(settings(one, temperature=0, num_samples=None, output_dir=f"plain-{one.name}"))
        (folder,) = Path("evaluations").glob(f"*-{one.name}-countdown-*")
        assert texts_of(folder) == texts_of(Path(f"plain-{one.name}"))


# Adapters


def save_adapter(base: Path, folder: Path, **changes: object) -> Path:
    """An adapter of every linear layer that is not 0."""
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    peft_model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_adapter_is_evaluated_as_the_folder_that_it_is_merged_into(model, tmp_path):
    adapter = save_adapter(model, tmp_path / "adapter")
    merge(MergeSettings(model=str(model), adapter=str(adapter), output="merged"))
    evaluate(settings(model, output_dir="base"))
    (score,) = evaluate(settings(model, adapter=str(adapter), output_dir="on top"))
    assert score["adapter"] == str(adapter)
    evaluate(settings("merged", output_dir="one folder"))
    evaluate(settings(adapter, output_dir="by itself"))  # its configuration names its base
    assert texts_of(Path("on top")) == texts_of(Path("one folder")) == texts_of(Path("by itself"))
    assert texts_of(Path("on top")) != texts_of(Path("base"))


def test_an_adapter_that_does_not_belong_is_refused_before_anything_is_loaded(model, tiny_folder, loads, tmp_path):
    adapter = save_adapter(tiny_folder, tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"belongs to the base model {tiny_folder}.*model={model}"):
        evaluate(settings(model, adapter=str(adapter)))
    described = json.loads((adapter / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(model)
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"has the shape \[4, \d+\].*trained on another model"):
        evaluate(settings(model, adapter=str(adapter)))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no adapter_config.json"):
        evaluate(settings(model, adapter=str(adapter)))
    with pytest.raises(ValueError, match="an adapter belongs to one base model"):
        settings(model, tiny_folder, adapter=str(adapter))
    assert not loads and not Path("evaluations").exists()


# Problems


def test_a_file_is_of_the_task_whose_columns_it_has(tiny_folder):
    rows = {
        "countdown": [{"nums": [1, 2, 3], "target": 9, "id": 7}],
        "gsm8k": [{"question": "1 + 1?", "answer": "Two.\n#### 2"}],
        "math": [{"question": "1 + 1?", "answer": "2"}],
    }
    for task, content in rows.items():
        for ending, text in ((".jsonl", json.dumps(content[0])), (".json", json.dumps(content))):
            path = Path(f"{task}{ending}")
            path.write_text(text)
            assert find_set(str(path), None, is_chat=False).task == task
            (row,) = Evaluation(settings(tiny_folder, task=str(path), num_problems=None)).task.eval
            assert row["prompt"]
    assert find_set("countdown.json", None, is_chat=True).dataset == "countdown.json"


@pytest.mark.parametrize(
    ("name", "asked", "column"),
    [
        ("math500", ("HuggingFaceH4/MATH-500", "test"), "problem"),
        ("aime24", ("HuggingFaceH4/aime_2024", "train"), "problem"),
        ("gsm8k", ("openai/gsm8k:main", "test"), "question"),
    ],
)
def test_a_named_set_is_every_row_of_its_split_in_its_order(tiny_folder, monkeypatch, name, asked, column):
    seen = set()

    def load_dataset(*names, split):
        seen.add((":".join(names), split))
        return datasets.Dataset.from_list([{column: f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    evaluation = Evaluation(settings(tiny_folder, task=name, num_problems=None))
    assert seen == {asked}
    assert [f"{i} + 1?" in text for i, text in enumerate(evaluation.prompts.texts)] == [True] * 9
    with pytest.raises(ValueError, match="num_problems=10: there are 9 problems"):
        Evaluation(settings(tiny_folder, task=name, num_problems=10))


def test_countdown_of_a_chat_model_is_the_five_hundred_held_out_rows(tiny_folder, monkeypatch):
    rows = [{"nums": [a, b + 30, 9], "target": a + b + 39} for a in range(30) for b in range(30)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: datasets.Dataset.from_list(rows))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    found = find_set("countdown", None, is_chat=True)
    assert found.dataset == "Jiayi-Pan/Countdown-Tasks-3to4"
    task = load_problems(found, GRPOConfig(model=str(tiny_folder)), tokenizer)
    assert len(task.eval) == 500 and not task.train
    assert task.eval[0]["prompt"][-1]["role"] == "assistant"
    plain = Evaluation(settings(tiny_folder, num_problems=None))
    assert len(plain.prompts) == 256 and plain.prompts.columns["nums"] == [row["nums"] for row in problems()[1]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("math500", 500), ("aime24", 30), ("gsm8k", 1319)])
def test_real_records_are_read_whole_and_as_in_training(tmp_path, name, count):
    path = RECORDS / name / "test.jsonl"
    if not path.is_file():
        pytest.skip("no records beside the project")
    folder = save_untrained(tmp_path / "model", **SIZES, max_position_embeddings=8192)
    of_name = Evaluation(settings(folder, task=name, dataset=str(path), num_problems=None))
    of_file = Evaluation(settings(folder, task=str(path), num_problems=None))
    assert len(of_name.prompts) == count and of_name.num_left_out == of_name.prompts.num_dropped == 0
    assert of_name.prompts.texts == of_file.prompts.texts and of_name.prompts.columns == of_file.prompts.columns
    first = json.loads(path.read_text().splitlines()[0])
    assert next(first[key] for key in ("problem", "question") if key in first) in of_name.prompts.texts[0]
    (score,) = evaluate(settings(folder, task=str(path), num_problems=3, num_samples=2))
    assert score["accuracy"] == 0 and score["num_problems"] == 3


def test_what_is_left_out_is_counted_and_said(tiny_folder):
    rows = [{"problem": f"Is {i} even?", "answer": ("yes", "no", "4")[i % 3]} for i in range(6)]
    path = write(Path("mine.jsonl"), [*rows, {"problem": "long " * 30, "answer": "5"}])
    (score,) = evaluate(settings(tiny_folder, task=path, num_problems=None, max_prompt_length=140))
    assert (score["num_problems"], score["num_left_out"], score["num_too_long"]) == (2, 4, 1)
    assert "without 1 rows whose prompt is longer" in table([score])
    assert "without 4 rows whose answer is yes, no, true or false, or nothing that could be matched" in table([score])


def test_answers_that_nobody_can_match_are_left_out_too(tiny_folder):
    rows = [{"problem": f"p{answer}", "answer": answer} for answer in ("1", "proof", "2")]
    (score,) = evaluate(settings(tiny_folder, task=write(Path("mine.jsonl"), rows), num_problems=None))
    assert (score["num_problems"], score["num_left_out"]) == (2, 1)


def test_the_lenient_accuracy_stands_beside_the_strict_one_and_is_no_reward(tiny_folder, monkeypatch):
    monkeypatch.setattr(math, "lenient_accuracy", lambda completions, answer, **_: [float(a == "1") for a in answer])
    rows = [{"problem": f"p{answer}", "answer": answer} for answer in ("1", "2")]
    (score,) = evaluate(settings(tiny_folder, task=write(Path("mine.jsonl"), rows), num_problems=None))
    assert (score["lenient_accuracy"], score["accuracy"]) == (0.5, 0.0)
    assert score["rewards"].keys() == {"correct", "boxed"}
    (folder,) = Path("evaluations").iterdir()
    lenient = [[c["lenient"] for c in row["completions"]] for row in result_of(folder)[1]]
    assert all(lenient[0]) and not any(lenient[1])
    heads, _, cells = (line.strip("| ").split("|") for line in table([score]).splitlines()[-3:])
    named = dict(zip(map(str.strip, heads), map(str.strip, cells), strict=True))
    assert (named["accuracy"], named["lenient accuracy"]) == ("0.000", "0.500")


# Settings


def test_greedy_is_one_completion(tiny_folder):
    assert settings(tiny_folder, temperature=0, num_samples=None).num_samples == 1
    assert settings(tiny_folder, num_samples=None).num_samples == 8
    evaluate(settings(tiny_folder, temperature=0, num_samples=None, output_dir="greedy"))
    evaluate(settings(tiny_folder, top_k=1, num_samples=1, output_dir="the likeliest"))
    assert texts_of(Path("greedy")) == texts_of(Path("the likeliest"))


def test_seeds_give_other_completions(tiny_folder):
    for seed in (0, 1):
        evaluate(settings(tiny_folder, seed=seed, output_dir=f"seed {seed}"))
    assert texts_of(Path("seed 0")) != texts_of(Path("seed 1"))


def test_completions_may_fill_half_of_what_the_model_has_room_for(tiny_folder, tmp_path):
    assert Evaluation(settings(tiny_folder, max_completion_length=None)).config.max_completion_length == 256
    large = save_untrained(tmp_path / "large", **SIZES, max_position_embeddings=32768)
    assert Evaluation(settings(large, max_completion_length=None)).config.max_completion_length == 4096
    with pytest.raises(ValueError, match=r"max_completion_length=510 and a prompt of \d tokens: .* room for 512"):
        Evaluation(settings(tiny_folder, max_completion_length=510))


def test_prompt_file_and_thinking_are_those_of_training(tmp_path):
    folder = save_untrained(tmp_path / "model", **SIZES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE + "{{ 'thinks' if enable_thinking else 'answers' }}"
    tokenizer.save_pretrained(folder)
    Path("around.txt").write_text("Be brief. {prompt} Go!")
    path = write(Path("mine.jsonl"), [{"problem": "1 + 1?", "answer": "2"}])
    asked = {"task": path, "num_problems": None, "prompt_file": "around.txt"}
    texts = [Evaluation(settings(folder, **asked, enable_thinking=on)).prompts.texts[0] for on in (True, False)]
    assert all(text.startswith("<user>Be brief. 1 + 1?") and " Go!" in text for text in texts)
    assert texts[0].endswith("thinks") and texts[1].endswith("answers")


def test_memory_and_precision_reach_the_sampler(tiny_folder):
    chosen = {"vllm_memory_share": 0.3, "vllm_max_num_seqs": 5, "dtype": "bfloat16"}
    config = Evaluation(settings(tiny_folder, **chosen)).config
    assert {name: vars(config)[name] for name in chosen} == chosen


def test_settings_come_from_the_command_line_and_from_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: a\ntask: gsm8k\ntemperature: 1\nnum_samples: 4\n")
    read = parse_settings(EvaluationSettings, ["--config", "mine.yaml", "--num_samples=2", "--model", "b", "c"])
    assert (read.model, read.task, read.temperature, read.num_samples) == (["b", "c"], "gsm8k", 1.0, 2)
    assert parse_settings(EvaluationSettings, ["--config", "mine.yaml"]).model == ["a"]
    with pytest.raises(ValueError, match=r"unknown setting 'num_sample' .* Did you mean num_samples"):
        parse_settings(EvaluationSettings, ["--model", "a", "--num_sample", "3"])
    with pytest.raises(ValueError, match="--task"):
        parse_settings(EvaluationSettings, ["--model", "a"])


def test_a_bar_is_drawn_only_where_somebody_looks(tiny_folder, capsys, monkeypatch):
    evaluate(settings(tiny_folder))
    assert "sampling" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate(settings(tiny_folder, seed=1))
    assert "sampling: 100%" in capsys.readouterr().err


# What a user can get wrong

GOOD = {"nums": [1, 2, 3], "target": 9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"mine.jsonl: it has no rows"),
        ("[]", r"mine.jsonl"),
        (f"{json.dumps(GOOD)}\n" + '{"nums": [1, 2\n', r"mine.jsonl: line 2 is not JSON"),
        (json.dumps({"text": "a"}), r"its rows have the columns text, .*nums and target.*####.*problem.*Rename"),
        (json.dumps(GOOD) + '\n{"nums": [1, 2, 3]}', r"row 2 holds nums; .*Add or rename target"),
        (json.dumps({"nums": ["1"], "target": 10}), r"row 1 has nums=\['1'\]"),
    ],
    ids=["empty", "another form", "broken line", "no task's columns", "a column missing later", "wrong type"],
)
def test_a_file_that_cannot_be_used(tiny_folder, loads, content, message):
    Path("mine.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate(settings(tiny_folder, task="mine.jsonl", num_problems=None))
    assert files() == ["mine.jsonl"] and not loads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "math50"}, r"task='math50': neither a set of problems nor a file.*math500"),
        ({"task": "no.jsonl"}, r"task=no.jsonl: there is no such file"),
        ({"task": "no.jsonl", "dataset": "other.jsonl"}, r"Leave out --dataset"),
        ({"task": "gsm8k", "dataset": "no.jsonl"}, r"dataset=no.jsonl: there is no such file"),
        ({"num_problems": 0}, r"num_problems=0: need at least 1 problem"),
        ({"num_problems": 257}, r"num_problems=257: there are 256 problems.*--num_problems 256"),
        ({"num_held_out": 0}, r"^num_held_out=0: need at least 1 row"),
        ({"num_held_out": 2, "task": "math500"}, r"^task=math500 with num_held_out: .*Pass --task math,"),
        ({"temperature": 0}, r"^num_samples=2 with temperature=0.*Pass --temperature 1.0 or --num_samples 1"),
        ({"temperature": 3}, r"^temperature=3.0: need 0"),
        ({"top_p": 0}, r"^top_p=0.0: .*--top_p"),
        ({"top_k": -1}, r"^top_k=-1: .*--top_k"),
        ({"num_samples": 0}, r"^num_samples=0: need at least 1"),
        ({"max_completion_length": 0}, r"^max_completion_length=0: need at least 1"),
        ({"max_prompt_length": 2}, r"^max_prompt_length=2: no prompt of 6 is short enough"),
        ({"sampler": "trl"}, r"^sampler='trl': need one of vllm, transformers"),
        ({"temperature": "warm"}, r"^temperature='warm': need a number"),
        ({"prompt_file": "no.txt"}, r"^prompt_file=no.txt: there is no such file"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_used(tiny_folder, loads, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(settings(tiny_folder, **changes))
    assert not files() and not loads


def test_a_model_that_cannot_be_used(tiny_folder, loads, tmp_path):
    """Nor is the first of two loaded before the second is looked at."""
    for wrong, reason in {"no/such-model": "cannot be loaded", str(tmp_path): "the folder has no config.json"}.items():
        with pytest.raises(ValueError, match=rf"model='{wrong}': {reason}"):
            evaluate(settings(tiny_folder, wrong))
    shutil.copytree(tiny_folder, tmp_path / "mute")
    for path in (tmp_path / "mute").glob("tok*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"mute: its tokenizer cannot be loaded"):
        evaluate(settings(tmp_path / "mute"))
    with pytest.raises(ValueError, match=r"need a model to evaluate"):
        settings()
    assert not loads and not Path("evaluations").exists()


def test_without_vllm_the_message_says_what_to_do(tiny_folder, monkeypatch, loads):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"make install.*--sampler transformers"):
        evaluate(settings(tiny_folder, sampler="vllm"))
    assert not loads


def test_torchrun_is_refused(tiny_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2.*without torchrun"):
        evaluate(settings(tiny_folder))


def test_named_sets_are_those_of_the_documentation():
    assert list(NAMED_SETS) == ["math500", "aime24", "gsm8k", "countdown"]


# Pass rates


def rates(*models: Path | str, **changes: object) -> EvaluationSettings:
    return settings(*models, **{"write_pass_rates": "rates.jsonl", "num_samples": 4, "temperature": None} | changes)


def test_pass_rates_are_of_the_prompts_that_training_has(tiny_folder, tmp_path):
    Path("r.py").write_text(
        "def odd(prompts, completions, **columns):\n    return [len(x) % 2 for x in completions]\n"
    )
    own = {"rewards": ["r.py:odd"], "max_completion_length": 20}
    config = GRPOConfig(
        model=str(tiny_folder), task="countdown", sampler="transformers", max_prompt_length=16, num_eval_prompts=100,
        output_dir=str(tmp_path / "run"), progress=False, prompt_weights="rates.jsonl", **own,
    )  # fmt: skip
    (score,) = evaluate(rates(tiny_folder, **own, accuracy="odd", num_problems=9))
    assert score["settings"]["temperature"] == config.temperature == 1 and score["num_problems"] == 9
    found = [json.loads(line) for line in Path("rates.jsonl").read_text().splitlines()]
    rows = result_of(next(Path("evaluations").iterdir()))[1]
    right = [sum(completion["correct"] for completion in row["completions"]) for row in rows]
    assert sum(right) == round(36 * score["accuracy"]) and len(set(right)) > 2
    assert [row["pass_rate"] for row in found] == [count / 4 for count in right]
    smoothed = [(count + 0.5) / 5 for count in right]
    assert [row["weight"] for row in found] == pytest.approx([rate * (1 - rate) for rate in smoothed], abs=1e-6)
    trainer = GRPOTrainer(config)
    assert [row["prompt"] for row in found] == trainer.prompts.raw[:9]
    weights = trainer.prompts.weights
    assert weights.values[:9].tolist() == [row["weight"] for row in found]
    assert f"{len(trainer.prompts) - 9} of {len(trainer.prompts)} have no row in the file" in weights.said
    assert not set(trainer.eval_prompts.texts) & {row["prompt"] for row in found}


def test_a_file_of_pass_rates_is_replaced_by_the_same_command_only(tiny_folder, loads):
    evaluate(rates(tiny_folder))
    before = Path("rates.jsonl").read_bytes()
    evaluate(rates(tiny_folder))
    Path("rates.jsonl").unlink()
    evaluate(rates(tiny_folder))  # from the completions that are there
    assert Path("rates.jsonl").read_bytes() == before and len(loads) == 1
    for changes, content in (({"seed": 1}, before), ({}, b""), ({}, before + b"\n")):
        Path("rates.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"write_pass_rates=rates.jsonl: the file is there .*delete the file"):
            evaluate(rates(tiny_folder, **changes))
        assert Path("rates.jsonl").read_bytes() == content and len(loads) == 1


def test_pass_rates_make_the_folder_of_their_file(tiny_folder):
    evaluate(rates(tiny_folder, write_pass_rates="new/below/rates.jsonl"))
    assert Path("new/below/rates.jsonl").read_bytes()


def test_pass_rates_of_prompts_of_your_own(tiny_folder):
    """A prompt that the data have twice has one row; one that is held out has none."""
    Path("r.py").write_text("def right(prompts, completions, n, **columns):\n    return [float(x == 1) for x in n]\n")
    chat = [{"role": "user", "content": "3 make 3"}]
    data = [{"prompt": "1 make 1\n", "n": 0}, {"prompt": "1 make 1\n", "n": 1}, {"prompt_ids": [4, 5], "n": 1}]
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    shutil.copytree(tiny_folder, "chat")
    tokenizer.save_pretrained("chat")
    own = {"task": "prompts", "dataset": write(Path("mine.jsonl"), [*data, {"prompt": chat, "n": 0}])}
    own |= {"rewards": ["r.py:right"], "num_problems": None, "num_samples": 2, "num_held_out": 0}
    with pytest.raises(ValueError, match=r"write_pass_rates=rates.jsonl: .*none of right is known .*Pass --accuracy"):
        evaluate(rates("chat", **own))
    evaluate(rates("chat", **own, accuracy="right"))
    found = [json.loads(line) for line in Path("rates.jsonl").read_text().splitlines()]
    assert [(row["samples"], row["pass_rate"]) for row in found] == [(4, 0.5), (2, 1.0), (2, 0.0)]
    assert [row.get("prompt", row.get("prompt_ids")) for row in found] == ["1 make 1\n", [4, 5], chat]
    Path("rates.jsonl").unlink()
    (score,) = evaluate(rates("chat", **own | {"num_held_out": 1}, accuracy="right"))
    held_out = find_set("prompts", own["dataset"], is_chat=True, num_held_out=1)
    config = GRPOConfig(model="chat", rewards=own["rewards"])
    (row,) = load_problems(held_out, config, tokenizer).eval
    assert score["num_problems"] == 3 - (row["prompt"] == "1 make 1\n")
    left = [json.loads(line) for line in Path("rates.jsonl").read_text().splitlines()]
    assert row["prompt"] not in [each.get("prompt") for each in left]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"write_pass_rates": "rates.csv"}, r"^write_pass_rates=rates.csv: JSON lines .*weights.jsonl"),
        ({"write_pass_rates": "rates.jsonl.gz"}, r"^write_pass_rates=rates.jsonl.gz: JSON lines"),
        (
            {"write_pass_rates": "/proc/none/rates.jsonl"},
            r"^write_pass_rates=/proc/none: nothing can be written there",
        ),
        ({"model": ["tiny", "tiny-r1"]}, r"^write_pass_rates=rates.jsonl with 2 models"),
        (
            {"temperature": 0, "num_samples": None},
            r"^write_pass_rates=rates.jsonl with temperature=0: .*--num_samples",
        ),
        ({"num_samples": 1}, r"^write_pass_rates=rates.jsonl with num_samples=1: .*several samples"),
        ({"num_held_out": -1}, r"^num_held_out=-1: need 0 or more"),
        ({"num_held_out": 257}, r"^num_held_out=257: only 256 .*Pass --num_held_out 256"),
        ({"task": "math500"}, r"^task=math500 with write_pass_rates: .*Pass --task math,"),
        ({"rewards": ["format"]}, r"none of format is known to be that one"),
    ],
    ids=str,
)
def test_pass_rates_that_cannot_be_had(tiny_folder, loads, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(replace(rates(tiny_folder), **changes))
    assert not files() and not loads


# The date


DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHAT_TEMPLATE


@pytest.fixture
def dated(model, tmp_path) -> Path:
    """A run of a model whose chat template writes the date; it began on the last day of February 2024."""
    folder = tmp_path / "run" / "final"
    shutil.copytree(model, folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    (tmp_path / "run" / "config.yaml").write_text("num_steps: 1\n")
    record = {"now": "2024-02-29T10:00:00", "chat_template": "", "prompt_file": "", "training": {}, "held-out": None}
    (tmp_path / "run" / "prompts.json").write_text(json.dumps(record))
    return folder


def test_prompts_have_the_date_of_the_run_a_model_comes_from(dated, tmp_path):
    def dates(*models: Path, **changes: object) -> list[str]:
        problems = write(tmp_path / "problems.jsonl", [{"nums": [3, 5], "target": 8}])
        changes = {"task": problems, "num_problems": 1, **changes}
        return [Evaluation(settings(each, **changes)).prompts.texts[0][:10] for each in models]

    elsewhere = shutil.copytree(dated, tmp_path / "copy")
    today = datetime.now().strftime("%Y-%m-%d")
    assert dates(dated, elsewhere) == ["2024-02-29", today]
    assert dates(dated, elsewhere, date="2020-12-31") == ["2020-12-31"] * 2
    assert settings(dated, date=date(2020, 12, 31)).date == "2020-12-31"  # as YAML reads it
    with pytest.raises(ValueError, match=r"date=today: .*--date"):
        settings(dated, date="today")


def test_models_of_one_table_have_the_same_date(dated, tmp_path, monkeypatch):
    elsewhere = shutil.copytree(dated, tmp_path / "copy")
    seen = []
    monkeypatch.setattr(command, "Evaluation", lambda settings, parent: seen.append(settings.date) or 1 / 0)
    for models in ((elsewhere, dated), (dated, elsewhere)):
        with pytest.raises(ZeroDivisionError):
            evaluate(settings(*models))
    assert seen == ["2024-02-29T10:00:00"] * 2
