"""Engines of vLLM that several processes share give what an engine of each process gives; sizes that cannot be."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from common.embedded.policy import save_untrained
from common.sampling.checks import check_engines
from common.sampling.vllm_group import group_arguments
from tests.toy import metrics_of, save_toy_policy, toy_config

ROOT = Path(__file__).parent.parent
SEVERAL = pytest.mark.several
# Engines and models of each kind of run: refills and evaluations, greedy completions beside others, continuations.
# What the last two ask for at once is among what the processes sample without a run, too.
RUNS = {"GRPO": ("1,none", "2,full"), "ReMax": ("1,none", "2,none"), "VinePPO": ("1,none", "2,none")}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads, as wide as vLLM needs them on a CPU, and two of keys and values."""
    return save_toy_policy(tmp_path_factory.mktemp("policy") / "policy", hidden_size=128)


def launched(policy: Path, folder: Path, processes: int, *arguments: str) -> Path:
    """The folder of what so many processes have written."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
            *("-m", "tests.tensor_parallel", str(policy), str(folder), *arguments),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def pair(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(policy, tmp_path_factory.mktemp("pair"), 2, "1,2", *runs_of("GRPO"))


@pytest.fixture(scope="module")
def others(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(policy, tmp_path_factory.mktemp("others"), 2, "", *runs_of("ReMax"), *runs_of("VinePPO"))


def runs_of(name: str) -> list[str]:
    return [f"{name},{kind}" for kind in RUNS[name]]


@pytest.fixture(scope="module")
def four(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(policy, tmp_path_factory.mktemp("four"), 4, "1,2,4")


def cases() -> list:
    """Numbers of processes, each of them, and how many share an engine."""
    found = [(n, process, size) for n, size in ((2, 2), (4, 2), (4, 4)) for process in range(n)]
    return [pytest.param(*each, marks=[SEVERAL] if each[0] == 4 else []) for each in found]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "process", "size"), cases())
def test_a_shared_engine_gives_each_process_what_its_own_would(processes, process, size, request):
    folder = request.getfixturevalue("pair" if processes == 2 else "four")
    found = torch.load(folder / f"sampled-{process}.pt", weights_only=False)
    own, shared = found["1"], found[str(size)]
    assert own.keys() == shared.keys() and (len(own) > 2 or process == 2)
    assert shared["NaN"] == own["NaN"] and "NaN among" in own["NaN"][0]
    for case in own.keys() - {"NaN"}:
        assert [each.token_ids for each in shared[case]] == [each.token_ids for each in own[case]], case
        assert [each.truncated for each in shared[case]] == [each.truncated for each in own[case]], case
        for one, other in zip(own[case], shared[case], strict=True):
            torch.testing.assert_close(torch.tensor(other.logprobs), torch.tensor(one.logprobs), rtol=0, atol=1e-5)
    if process != 2:
        assert shared["reported"] == shared["drawn"] and shared["again"] == shared["greedy"]
        assert shared["pushed"] != shared["drawn"][: len(shared["pushed"])]
        assert len({len(each.token_ids) for case in shared for each in shared[case] if case != "NaN"}) > 3


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["GRPO", *(pytest.param(name, marks=SEVERAL) for name in ("ReMax", "VinePPO"))])
def test_a_run_with_a_shared_engine_has_the_metrics_of_one_without(algorithm, request):
    folder = request.getfixturevalue("pair" if algorithm == "GRPO" else "others")
    own, shared = (metrics_of(folder / run) for run in runs_of(algorithm))
    assert len(own) == len(shared) > 1
    assert algorithm != "GRPO" or own[-1]["refill/completions"] > 0
    for one, other in zip(own, shared, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


LONG = """
import logging
import sys
from pathlib import Path
import common
from common.sampling import vllm_engine
from tests.toy import toy_trainer

logging.basicConfig()
logging.getLogger("nanorlhf").setLevel("INFO")
settings = {"sampler": "vllm", "vllm_tensor_parallel": 2, "save_every": 1, "stop_grace": 1.0, "num_generations": 16}
trainer = toy_trainer(Path(sys.argv[1]), Path(sys.argv[2]), max_completion_length=460, **settings)
generate = vllm_engine.generate

def said(*args):
    print("begins", flush=True)
    found = generate(*args)
    print("ends", flush=True)
    return found

vllm_engine.generate = said
trainer.train()
"""


@pytest.mark.slow
def test_processes_that_share_an_engine_leave_their_completions_together_when_a_signal_comes(tmp_path):
    save_untrained(tmp_path / "policy", hidden_size=128, intermediate_size=64, num_hidden_layers=2)  # hardly ends
    (tmp_path / "run.py").write_text(LONG)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.Popen(
        [*command, str(tmp_path / "run.py"), str(tmp_path / "policy"), str(tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = ""
        while "begins" not in said:
            said += run.stdout.readline()
        run.send_signal(signal.SIGTERM)
        began = time.monotonic()
        said += run.communicate(timeout=120)[0]
    finally:
        run.kill()
    assert time.monotonic() - began < 60, (
        said
    )  # processes that wait for each other are killed after 30 s, or never end
    assert "ends" not in said and "Gloo" not in said and said.count("SIGTERM: finishing step 1") == 1, said
    assert said.count("SIGTERM: left after step 0 of 2") == 1, said


@pytest.mark.parametrize(("size", "kept", "off"), [(1, True, False), (2, True, True), (2, False, False)])
def test_vllm_sums_by_itself_only_where_its_buffers_can_be_shared(monkeypatch, size, kept, off):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", f"expandable_segments:{kept}")
    assert ("disable_custom_all_reduce" in group_arguments(size)) == off


def skeleton(**sizes: int) -> torch.nn.Module:
    sizes = {
        "vocab_size": 192 * 4,
        "hidden_size": 384,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
    } | sizes
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Qwen2Config(num_hidden_layers=1, **sizes))


@pytest.mark.parametrize(
    ("size", "processes", "sizes", "said"),
    [
        (2, 1, {}, "vllm_tensor_parallel=2 with one process: 2 processes share an engine"),
        (4, 6, {}, "vllm_tensor_parallel=4 with 6 processes: each engine needs 4 of them, and none may be left over."),
        (8, 8, {}, "has 12 attention heads, no multiple of 8"),
        (3, 6, {}, "has 4 heads of keys and values, neither a multiple nor a divisor of 3"),
        (4, 4, {"intermediate_size": 98}, "has intermediate_size 98, no multiple of 4"),
        (3, 3, {"num_key_value_heads": 12, "vocab_size": 200}, "has a vocabulary of 200, which vLLM fills up to 256"),
    ],
    ids=["one process", "processes", "heads", "keys", "width", "vocabulary"],
)
def test_what_cannot_be_divided_into_parts_is_refused_before_loading(tmp_path, size, processes, sizes, said):
    config = toy_config(tmp_path, tmp_path / "run", sampler="vllm", vllm_tensor_parallel=size)
    with pytest.raises(ValueError) as caught:
        check_engines(config, skeleton(**sizes), processes)
    assert said in str(caught.value) and "--vllm_tensor_parallel 1" in str(caught.value)


def test_the_refusal_names_the_sizes_that_are_possible(tmp_path):
    config = toy_config(tmp_path, tmp_path / "run", sampler="vllm", vllm_tensor_parallel=8)
    with pytest.raises(ValueError, match="Pass --vllm_tensor_parallel 1 or 2 or 4 or 12, or start a multiple of 8"):
        check_engines(config, skeleton(), 12)


def test_engines_across_nodes_are_said_and_other_samplers_have_none(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="nanorlhf")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    settings = {"vllm_tensor_parallel": 4, "sampler": "vllm"}
    check_engines(toy_config(tmp_path, tmp_path / "run", **settings), skeleton(), 4)
    assert "2 processes on a node: some engines are on two nodes" in caplog.text
    check_engines(toy_config(tmp_path, tmp_path / "run", **settings | {"sampler": "transformers"}), skeleton(), 1)
