"""Fixtures for several test modules. Imports `common` first: it prepares the environment before torch loads."""

import common  # noqa: F401, I001

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from common.rollouts import Completion, PromptBatch, Rollouts
from common.runs.plots import draw_curves
from tests.toy import save_toy_policy
from common.embedded.policy import build_tokenizer, save_untrained


# On a shared machine, seconds per example depend on its load more than on the code.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

pytest_plugins = ["tests.fixtures_engine", "tests.fixtures_server"]
ENGINE_FIXTURES = {"vllm_sampler", "make_vllm_sampler", "vllm_server"}
# Files that take longer than their number of slow tests says, the longest first. With --dist loadfile a worker that
# begins with one of them when all others are done is waited for.
LONGEST = (
    *("test_evaluation_command", "test_vllm_server", "test_compare_algorithms", "test_tensor_parallel"),
    *("test_pipeline", "test_stopping", "test_models_table", "test_sharded_checkpoints", "test_soak"),
    *("test_sft_example", "test_sampling", "test_notebooks", "test_lost_process", "test_slurm_example"),
)


def seed_everything() -> None:
    """The same random state for every fixture and test, whichever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: object, request: object) -> None:
    """A fixture that draws something draws the same in any company."""
    seed_everything()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """So does a test."""
    seed_everything()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need an engine as slow, run the longest files first, and skip tests marked gpu without a GPU.

    With the longest files first, workers side by side end at about the same time.
    """
    for item in items:
        has_engine = "vllm" in item.name.partition("[")[2] and "models" not in item.keywords
        if ENGINE_FIXTURES.intersection(item.fixturenames) or has_engine:
            item.add_marker("slow")
    slow = Counter(item.path for item in items if "slow" in item.keywords)
    place = {name: number for number, name in enumerate(LONGEST)}
    # Stable: the order within a file stays.
    items.sort(key=lambda item: (place.get(item.path.stem, len(LONGEST)), -slow[item.path]))
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy of two layers with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    return save_untrained(folder, hidden_size=32, intermediate_size=64, num_hidden_layers=2)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy for which every eighth token is an end token."""
    return save_toy_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session", autouse=True)
def without_curves() -> Iterator[None]:
    """Skip curves.png, which takes most of a toy run's time; what tests it asks for `with_curves`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.runs.run.draw_curves", lambda folder: None)
        yield


@pytest.fixture(scope="session")
def with_curves(without_curves: None) -> Callable[[], AbstractContextManager]:
    """A context in which runs draw curves.png again."""

    @contextmanager
    def drawing() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("common.runs.run.draw_curves", draw_curves)
            yield

    return drawing


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded policy's tokenizer."""
    return build_tokenizer()


@pytest.fixture
def rollouts() -> Rollouts:
    """Three prompts of 2, 5 and 3 tokens with two completions of different lengths each."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 60, (count,), generator=generator).tolist()

    prompts = PromptBatch(
        step=1,
        rows=[0, 1, 2],
        prompt_ids=[tokens(2), tokens(5), tokens(3)],
        prompts=["a", "b", "c"],
        columns={"answer": [1, 2, 3]},
    )
    lengths = [4, 1, 7, 3, 2, 5]
    completions = [Completion(tokens(length), [-1.0] * length, truncated=length == 7) for length in lengths]
    batch = Rollouts.from_completions(prompts, completions, [f"text {i}" for i in range(6)], num_generations=2)
    batch.step_lengths = batch.lengths
    return batch
