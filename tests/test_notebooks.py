"""The notebooks of examples/ run from top to bottom, with small numbers in their cell of parameters."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from common.embedded.policy import save_untrained
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, parameters: str) -> nbformat.NotebookNode:
    """Execute a notebook in its folder, with other parameters; an error in a cell is an error of the test."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source = parameters
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells print."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_the_tutorial_builds_grpo_from_the_verbs_and_ends_with_a_curve(tmp_path):
    notebook = run("tutorial.ipynb", f"NUM_STEPS = 5\nOUTPUT_DIR = {str(tmp_path / 'run')!r}")
    text = printed(notebook)
    assert "32 prompts x 8 completions = 256 rows" in text
    better, worse = re.findall(r"([+-]0\.\d+) where", text)
    assert float(better) > 0 > float(worse)
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[-2].outputs)
    assert (tmp_path / "run" / "final" / "config.json").is_file()


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_name_no_path_of_a_machine(file):
    text = file.read_text()
    assert "/home/" not in text and "/tmp/" not in text and "/work/" not in text and "/root/" not in text


# The playground


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run of one step on the embedded Countdown problems, with a checkpoint, by an untrained policy."""
    folder = tmp_path_factory.mktemp("finished")
    model = save_untrained(folder / "policy", hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config = GRPOConfig(
        model=str(model),
        output_dir=str(folder / "run"),
        task="countdown",
        sampler="transformers",
        num_steps=1,
        prompts_per_step=2,
        num_generations=2,
        max_completion_length=8,
        save_every=1,
        eval_every=0,
        progress=False,
    )
    GRPOTrainer(config).train()
    return folder / "run"


def playground(run_folder: Path | None, output_dir: Path, models: list[str]) -> str:
    return (
        f"RUN, MODELS, TASK = {run_folder and str(run_folder)!r}, {models!r}, None\n"
        f"NUM_PROBLEMS, TEMPERATURE, MAX_COMPLETION_LENGTH = 3, 0.6, None\n"
        f"SAMPLER, OUTPUT_DIR = 'transformers', {str(output_dir)!r}"
    )


@pytest.mark.slow
def test_the_playground_shows_models_side_by_side_and_their_text_is_never_markup(finished_run, tmp_path):
    models = ["base", "checkpoint-1", "final"]
    notebook = run("playground.ipynb", playground(finished_run, tmp_path, models))
    text = printed(notebook)
    assert "models: base, checkpoint-1, final" in text
    assert all(f"{name}: 0.00 of 3 right" in text for name in models)
    page = notebook.cells[-1].outputs[0].data["text/html"]
    assert page.count("<tr>") == 4 and page.count("<td>") == 3 * 4
    assert set(re.findall(r"<(/?\w+)", page)) <= {
        *("style", "/style", "table", "/table", "tr", "/tr", "th", "/th", "td", "/td", "pre", "/pre", "b", "/b"),
        *("span", "/span"),
    }


@pytest.mark.slow
def test_a_model_that_the_run_does_not_have_is_answered_with_those_it_has(finished_run, tmp_path):
    with pytest.raises(
        CellExecutionError, match="MODELS has 'checkpoint-7'; the run has base, checkpoint-1 and final"
    ):
        run("playground.ipynb", playground(finished_run, tmp_path, ["checkpoint-7"]))


@pytest.mark.slow
def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(CellExecutionError, match="there is no finished run"):
        run("playground.ipynb", playground(tmp_path / "nothing", tmp_path / "out", ["base"]))
    assert not (tmp_path / "out").exists()
