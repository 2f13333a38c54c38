"""Asynchronous rewards have a loop of their own, also where one runs already."""

import asyncio
import gc
import threading

import nbformat
import pytest
from nbclient import NotebookClient

from common.rewards.event_loop import EventLoop
from common.rewards.scorer import Scorer


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def test_outcomes_are_in_the_order_of_what_was_waited_for():
    async def fails() -> None:
        raise KeyError("x")

    one, error, other = EventLoop().outcomes([double(1), fails(), double(2)])
    assert (one, other) == (2, 4) and isinstance(error, KeyError)


def test_it_works_within_a_running_loop_with_one_loop_for_the_whole_run():
    loops = []

    async def judge(completions, **columns):
        loops.append(asyncio.get_running_loop())
        return [float(len(text)) for text in completions]

    scorer = Scorer({"judge": judge}, {"judge": 1.0})
    assert scorer(["p"], ["abc"], {})[0].tolist() == [3.0]

    async def cell() -> list[float]:
        loops.append(asyncio.get_running_loop())
        return scorer(["p"], ["abcd"], {})[0].tolist()

    assert asyncio.run(cell()) == [4.0]
    assert loops[0] is loops[2] and loops[0] is not loops[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_ends_it_from_the_loop_too(error):
    async def stops() -> None:
        raise error

    loop = EventLoop()
    with pytest.raises(error):
        loop.outcomes([stops()])
    assert loop.outcomes([double(1)]) == [2]  # its thread is still there


def test_a_cancelled_task_is_an_error_of_its_function():
    async def cancelled() -> None:
        raise asyncio.CancelledError

    (error,) = EventLoop().outcomes([cancelled()])
    assert isinstance(error, RuntimeError) and "cancelled" in str(error)


def test_the_thread_ends_with_the_object_and_what_is_left_in_the_loop_with_it():
    ended, tasks = [], []

    async def leaves() -> None:
        async def goes_on() -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append(True)

        tasks.append(asyncio.create_task(goes_on()))
        await asyncio.sleep(0)

    gc.collect()
    before = threading.active_count()
    loop = EventLoop()
    loop.outcomes([leaves()])
    assert threading.active_count() == before + 1
    del loop
    assert threading.active_count() == before and ended == [True]


NOTEBOOK = """
import logging
logging.disable(logging.WARNING)
from common.tasks import Task
from tests.toy import toy_config, toy_task
from GRPO.grpo_trainer import GRPOTrainer
async def judge(completions, **columns):
    return [float(len(text)) for text in completions]
task = Task(train=toy_task().train, rewards={{"judge": judge}})
metrics = GRPOTrainer(toy_config({model!r}, {folder!r}, num_steps=1, progress=False), task=task).train()
print(metrics["score"] == metrics["reward/judge"])
"""


@pytest.mark.slow
def test_a_run_in_a_notebook_waits_for_its_rewards(toy_folder, tmp_path):
    source = NOTEBOOK.format(model=str(toy_folder), folder=str(tmp_path / "run"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = [output.text for output in notebook.cells[0].outputs if output.get("name") == "stdout"]
    assert "".join(printed) == "True\n"
