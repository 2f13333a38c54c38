"""Every architecture that vLLM and transformers share trains right, or is refused before it loads."""

from collections.abc import Iterator

import pytest

from tests.architectures import ARCHITECTURES, OF_EACH_KIND
from tests.cells import MODES, Cells, judge


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    with Cells(tmp_path_factory.mktemp("cells")) as measuring:
        yield measuring


def marked(architecture: str) -> object:
    marks = [pytest.mark.models, *([pytest.mark.slow] if architecture in OF_EACH_KIND else [])]
    return pytest.param(architecture, marks=marks)


@pytest.mark.parametrize("architecture", [marked(name) for name in ARCHITECTURES])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_trained_right_or_refused_before_it_loads(cells, architecture, mode):
    cell = cells.measure(architecture, mode)
    assert cell.verdict in ("right", "refused"), cell.reason


# The verdict itself

RIGHT = {
    **{"exit": 0, "loaded": True, "diff": [1e-7, 9e-6], "ratio": [1.0, 1.0], "kl": [0.0, 0.1], "gradient": [1.0, 2.0]},
    **{"final": 1e-5, "final misfits": []},
}


def test_what_agrees_everywhere_is_right():
    assert judge(RIGHT, "").verdict == "right"
    assert judge(RIGHT, "").logprob_diff == 9e-6
    assert judge(RIGHT | {"final": 7e-5, "rounding": 2e-5}, "").verdict == "right"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"diff": [1e-7, 1.1e-5]}, "1.1e-05"),
        ({"diff": [float("nan"), 1e-7]}, "logprob_diff"),
        ({"diff": [1e-7, float("nan")]}, "logprob_diff"),
        ({"diff": [1e-7, None]}, "logprob_diff"),
        ({"diff": [1e-7]}, "logprob_diff"),
        ({"ratio": [1.0, 0.9998]}, "first ratio"),
        ({"ratio": [1.0, None]}, "first ratio"),
        ({"kl": [1.7e-5, 0.1]}, "KL at step 1"),
        ({"gradient": [0.0, 0.0]}, "gradient"),
        ({"gradient": [1.0, float("nan")]}, "gradient"),
        ({"final": 6e-5}, "final 6.0e-05"),
        ({"final": float("nan")}, "final nan"),
        ({"merged": 1.0}, "merged 1.0e"),
        ({"final": 9e-5, "rounding": 2e-5}, "final 9.0e-05"),
        ({"final misfits": ["lm_head.weight"]}, "lm_head"),
        ({"exit": "AssertionError: no config\nmore"}, "AssertionError: no config"),
        ({"exit": "killed, status 9"}, "killed"),
    ],
)
def test_what_differs_anywhere_is_wrong(found, reason):
    cell = judge(RIGHT | found, "")
    assert cell.verdict == "WRONG" and reason in cell.reason


def test_a_refusal_is_short_and_comes_before_weights_are_loaded():
    refused, message = {"exit": 2}, "some notes\nerror: model=x: it cannot. Pass another.\n"
    assert judge(refused, message).verdict == "refused"
    assert judge(refused, message).reason == "model=x: it cannot. Pass another."
    assert "after weights" in judge(refused | {"loaded": True}, message).reason
    assert "in 9 lines" in judge(refused, "error: " + "line\n" * 9).reason
    assert "lines" in judge(refused, "error: " + "words " * 200).reason
