"""examples/pipeline: end to end, killed on the way and continued; other settings have other folders; folders load."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data.rows import read_rows
from common.models.loading import end_token_ids
from common.models.weights import policy_weights
from common.sampling.protocol import SamplingSettings
from common.sampling.vllm_sampler import VLLMSampler
from common.tasks.gsm8k import correct_reward
from examples.compare_algorithms.compare_algorithms import find_algorithms
from examples.pipeline.pipeline import make_stages, read_settings, run_pipeline
from examples.pipeline.records import RecordSettings, write_records
from examples.sft.conversations import read_examples
from examples.sft.tiny_model import build_tokenizer
from tests import forked

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "pipeline"
RECIPES = sorted(FOLDER.glob("*/pipeline.yaml"))
RECORDS = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
needs_records = pytest.mark.skipif(not RECORDS.is_dir(), reason="the GSM8K records are not here")
QUICK = {
    "records.num_train": 150,
    "records.num_test": 20,
    "sft.num_steps": 12,
    "sft.num_eval_prompts": 8,
    "rl.sampler": "transformers",
    "rl.num_steps": 3,
    "rl.prompts_per_step": 2,
    "rl.num_generations": 4,
    "rl.num_eval_prompts": 4,
    "rl.eval_every": 3,
    "rl.save_every": 1,
    "rl.max_completion_length": 24,
    "evaluate.sampler": "transformers",
    "evaluate.num_problems": 4,
    "evaluate.num_samples": 2,
    "evaluate.max_completion_length": 24,
}


def words(changes: dict) -> list[str]:
    return [word for name, value in changes.items() for word in (f"--{name}", str(value))]


def folders(arguments: list[str], output_dir: Path = Path("out")) -> dict[str, str]:
    """Name of each stage's folder."""
    settings = replace(read_settings(arguments), output_dir=output_dir)
    return {stage.name: stage.folder(output_dir).name for stage in make_stages(settings)}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in after if after[name] != before.get(name)]


AFTER_SFT = ["sft", "sft-merged", "evaluate-base", "evaluate-sft", "rl", "rl-merged", "evaluate-rl"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that was killed in the middle of RL and then started again."""
    output_dir = tmp_path_factory.mktemp("pipeline") / "out"
    arguments = [*words(QUICK), "--output_dir", str(output_dir)]
    command = [FOLDER / "pipeline.py", *arguments]
    with forked.Forked(command) as process:
        while not list(output_dir.glob("rl-??????/checkpoint-1/trainer_state.json")):
            assert process.poll(0.01) is None, process.stdout + process.stderr
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not list(output_dir.glob("rl-??????/final"))
    before = {path: path.stat().st_mtime_ns for path in (output_dir / folders(arguments)["sft"]).rglob("*")}
    second = forked.run(command)
    assert second.returncode == 0, second.stdout + second.stderr
    output_dir.with_name("said").write_text(second.stdout)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    return output_dir


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_where_it_was(finished):
    said = finished.with_name("said").read_text().splitlines()
    stages = [line for line in said if line.startswith("[")]
    assert [line.endswith("finished before") for line in stages] == [True] * 5 + [False] * 3
    (log,) = finished.glob("rl-??????.log")
    assert "(new)" in log.read_text() and "(continued after step" in log.read_text()
    (metrics,) = finished.glob("rl-??????/metrics.jsonl")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_table_has_the_model_before_after_sft_and_after_rl(finished):
    (table,) = finished.glob("table-*.md")
    rows = [line.split("|")[1].strip() for line in table.read_text().splitlines() if line.startswith("|")]
    assert rows == ["model", "---", "base", "after SFT", "after RL"]
    assert table.read_text() in finished.with_name("said").read_text()
    scores = [json.loads(path.read_text()) for path in finished.glob("evaluate-*/score.json")]
    assert len(scores) == 3 and all(score["num_problems"] == 4 for score in scores)


@pytest.mark.slow
def test_every_folder_loads_in_transformers(finished):
    names = ["sft-??????/base", "sft-??????/final", "sft-merged-??????", "rl-??????/final", "rl-merged-??????"]
    paths = [path for name in names for path in finished.glob(name)]
    assert len(paths) == 5
    for path in paths:
        model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert tokenizer.chat_template is not None and tokenizer.eos_token == "<|im_end|>"
        assert end_token_ids(model, tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.slow
def test_the_merged_model_loads_in_vllm_from_its_folder(finished):
    (path,) = finished.glob("rl-merged-??????")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "2?"}], add_generation_prompt=True)
    sampler = VLLMSampler(str(path), dtype="float32", max_model_len=128, max_num_seqs=4)
    sampler.wake()
    sampler.push(policy_weights(model))
    settings = SamplingSettings(temperature=0.0, max_tokens=8, stop_token_ids=(tokenizer.eos_token_id,))
    (completion,) = sampler.generate([prompt["input_ids"]], settings, num_generations=1, seeds=None)
    assert 0 < len(completion.token_ids) <= 8


@pytest.mark.slow
def test_a_finished_pipeline_has_nothing_to_do(finished, capsys):
    text = run_pipeline(read_settings([*words(QUICK), "--output_dir", str(finished)]))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 8 and all(line.endswith("finished before") for line in said)
    assert "after RL" in text


@needs_records
@pytest.mark.slow
def test_the_real_gsm8k_goes_all_the_way(tmp_path):
    arguments = words({name: value for name, value in QUICK.items() if not name.startswith("records")})
    for file, parts, num_rows in (("train", ("sft", "rl"), 150), ("test", ("evaluate",), 20)):
        path = tmp_path / f"{file}.jsonl"
        path.write_text("".join((RECORDS / path.name).read_text().splitlines(keepends=True)[:num_rows]))
        arguments += words({f"{part}.dataset": path for part in parts})
    arguments += ["--rl.max_prompt_length", "1000", "--records", "none", "--output_dir", str(tmp_path / "out")]
    table = run_pipeline(read_settings(arguments))
    assert [name in table for name in ("base", "after SFT", "after RL")] == [True] * 3
    (outputs,) = (tmp_path / "out").glob("evaluate-rl-*/outputs.jsonl")
    assert "Janet" in outputs.read_text()  # of the first test problem


# Which folders


def test_a_changed_setting_gives_that_stage_and_the_later_ones_other_folders():
    before = folders([])
    assert list(before) == ["records", *AFTER_SFT]
    assert changed(before, folders([])) == []
    assert changed(before, folders(["--records.seed", "1"])) == ["records", *AFTER_SFT]
    assert changed(before, folders(["--sft.learning_rate", "0.5"])) == AFTER_SFT
    assert changed(before, folders(["--rl.learning_rate", "0.5"])) == ["rl", "rl-merged", "evaluate-rl"]
    assert changed(before, folders(["--algorithm", "RLOO"])) == ["rl", "rl-merged", "evaluate-rl"]
    assert changed(before, folders(["--evaluate.temperature", "0.5"])) == [
        *("evaluate-base", "evaluate-sft", "evaluate-rl"),
    ]


def test_other_content_of_a_data_file_gives_other_folders(tmp_path):
    write_records(RecordSettings(num_train=9, num_test=3, output_dir=str(tmp_path / "data")))
    data = tmp_path / "data" / "train.jsonl"
    own = [f"--{part}.dataset={data}".split("=") for part in ("sft", "rl", "evaluate")]
    arguments = ["--records", "none", *(word for pair in own for word in pair)]
    before = folders(arguments)
    assert list(before) == AFTER_SFT
    data.write_text(data.read_text().replace("has", "had"))
    assert changed(before, folders(arguments)) == AFTER_SFT


def test_commands_are_those_a_user_would_type(tmp_path):
    stages = {stage.name: stage for stage in make_stages(read_settings(["--output_dir", str(tmp_path)]))}
    records, sft = (stages[name].folder(tmp_path) for name in ("records", "sft"))
    script, *options = stages["sft"].arguments(tmp_path)
    assert script.endswith("examples/sft/sft.py")
    config = str(sft) + ".yaml"
    assert options == ["--config", config, "--dataset", str(records / "train.jsonl"), "--output_dir", str(sft)]
    merged = stages["sft-merged"].folder(tmp_path)
    assert stages["sft-merged"].arguments(tmp_path) == [
        *("-m", "common.merge", "--model", str(sft), "--output", str(merged)),
    ]
    assert stages["rl"].arguments(tmp_path)[0].endswith("GRPO/grpo.py")
    evaluation = stages["evaluate-base"].arguments(tmp_path)
    assert evaluation[:2] == ["-m", "common.evaluation"] and str(sft / "base") in evaluation


@pytest.mark.parametrize("algorithm", find_algorithms(ROOT))
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_takes_every_algorithm(recipe, algorithm):
    own = {"PPO": ["--rl.value_backbone", "own"]}  # with all weights trained there is no frozen one to share
    settings = read_settings(["--config", str(recipe), "--algorithm", algorithm, *own.get(algorithm, [])])
    names = [stage.name for stage in make_stages(settings)]
    assert names[-7:] == AFTER_SFT
    assert settings.output_dir.name == f"pipeline-{recipe.parent.name}"


# What is refused, before any stage begins


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm", "grpo"], r"algorithm=grpo: no such folder. .*GRPO, GSPO, PPO"),
        (["--rl.learning_rat", "1"], "unknown setting 'learning_rat'"),
        (["--rl.num_generations", "1"], "num_generations=1"),
        (["--sft.batch", "1"], "unknown setting 'batch'"),
        (["--sft.batch_size", "0"], "batch_size=0: at least 1"),
        (["--evaluate.sample", "1"], "unknown setting 'sample'"),
        (["--records.size", "1"], "unknown setting 'size'"),
        (["--rl.model", "tiny"], "rl: model is given, and the pipeline sets it itself"),
        (["--sft.output_dir", "x"], "sft: output_dir is given"),
        (["--rl.dataset", "gone.jsonl"], "rl: dataset=gone.jsonl: there is no such file"),
        (["--evaluat.num_samples", "1"], "--evaluat.num_samples: there is no such setting"),
        (["--seed", "1"], "--seed: there is no such setting"),
        (["--sft", "none"], "--sft: there is no such setting"),
        (["--sft.seed"], "--sft.seed: need pairs"),
        (["--config", "gone.yaml"], "gone.yaml: there is no such file"),
    ],
)
def test_what_no_stage_would_take_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_pipeline(read_settings([*arguments, "--output_dir", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("algorithm: [", "not readable as YAML"),
        ("just text", "need lines of the form"),
        ("sft: sft.yaml\nmodel: x\n", "nothing reads model"),
        ("sft: gone.yaml\n", "gone.yaml: there is no such file"),
        ("sft:\n  dataset: a.jsonl\n", r"sft holds \{'dataset'.*need the name of a YAML file.*into sft.yaml"),
        ("sft: [a.yaml]\n", r"sft holds \['a.yaml'\]; need the name"),
        ("algorithm: 3\nsft: sft.yaml\n", "algorithm=3: no such folder"),
        ("algorithm: GRPO\n", "the recipe names no file for sft"),
        (
            "sft: nested.yaml\nrl: sft.yaml\nevaluate: task.yaml",
            "optimizer is a block with learning_rate, ",
        ),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "pipeline.yaml").write_text(content)
    (tmp_path / "sft.yaml").write_text("seed: 1\n")
    (tmp_path / "nested.yaml").write_text("optimizer: {learning_rate: 1.0e-5, weight_decay: 0.1}\n")
    (tmp_path / "task.yaml").write_text("task: gsm8k\n")
    with pytest.raises(ValueError, match=message):
        make_stages(read_settings(["--config", str(tmp_path / "pipeline.yaml")]))


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_pipeline_with_the_end_of_its_log(tmp_path):
    arguments = [*words(QUICK), "--sft.max_length", "20", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"(?s)stage sft ended with status 2.*no example .* is short enough.*Fix"):
        run_pipeline(read_settings(arguments))
    assert not list((tmp_path / "out").glob("sft-merged*"))


# Records


def test_records_are_right_different_and_a_function_of_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = RecordSettings(num_train=60, num_test=20, seed=seed, output_dir=str(tmp_path / name))
        write_records(settings)
    texts = {name: (tmp_path / name / "train.jsonl").read_text() for name in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]
    rows = [json.loads(line) for file in ("train", "test") for line in (tmp_path / "a" / f"{file}.jsonl").open()]
    assert len({row["question"] for row in rows}) == len(rows) == 80
    for row in rows:
        *lines, gold = row["answer"].split("\n")
        amount = int(row["question"].split()[2])
        for line in lines:
            left, operator, right, _, result = line.split()
            assert int(left) == amount and operator in "+-"
            amount = int(left) + int(right) if operator == "+" else int(left) - int(right)
            assert int(result) == amount >= 1
        assert gold == f"#### {amount}"


def test_records_are_problems_of_the_task(tmp_path):
    write_records(RecordSettings(num_train=20, num_test=5, output_dir=str(tmp_path / "data")))
    path = str(tmp_path / "data" / "test.jsonl")
    rows = read_rows(path, "", None)
    examples, _ = read_examples(path, "", form="auto", tokenizer=build_tokenizer(rows))
    completions = [example["completion"] for example in examples]
    gold = [row["answer"].partition("#### ")[2] for row in rows]
    assert correct_reward(gold, completions, answer=gold) == [1.0] * 5


@pytest.mark.slow
def test_records_that_cannot_be_made_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there are \d+ different problems"):
        write_records(RecordSettings(largest=2, share_two_steps=0.0, num_train=9000, output_dir=str(tmp_path / "a")))
    with pytest.raises(ValueError, match="at least 1, 1 and 2"):
        write_records(RecordSettings(num_train=0, output_dir=str(tmp_path / "a")))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes").touch()
    with pytest.raises(ValueError, match="nothing is overwritten"):
        write_records(RecordSettings(output_dir=str(tmp_path / "b")))
