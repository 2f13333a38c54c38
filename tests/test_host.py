"""The tightest limit counts, whichever version and level of cgroup has it, and what is left of it is what is free."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from common.host import give_back_memory, host_memory, num_cpus, oom_kills
from tests.cgroup import enter, limited_cgroup, one_cpu_cgroup
from tests.toy import ROOT

GB = 10**9


def lay_out(folder: Path, files: dict[str, str]) -> Path:
    """Write files, and give the folder of the process among them; {} in a text stands for the root."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{}", str(folder).replace(" ", "\\040")), encoding="utf-8")
    return folder / "proc"


V2 = {
    "proc/cgroup": "0::/jobs/mine\n",
    "proc/mountinfo": "22 1 0:2 / / rw - ext4 /dev/vda rw\n"
    "35 22 0:32 / {}/sys rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
    "sys/jobs/mine/memory.max": "max\n",
    "sys/jobs/mine/memory.current": f"{GB // 4}\n",
}
V1 = {
    "proc/cgroup": "5:cpu,cpuacct:/jobs/mine\n4:memory:/jobs/mine\n1:name=systemd:/\n",
    "proc/mountinfo": "35 31 0:32 / {}/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 / {}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n",
    "memory/jobs/mine/memory.limit_in_bytes": f"{GB}\n",
    "memory/jobs/mine/memory.usage_in_bytes": f"{GB // 2}\n",
    "memory/jobs/mine/memory.stat": f"cache 1\nhierarchical_memory_limit {GB}\ninactive_file 7\n"
    f"total_inactive_file {GB // 8}\ntotal_active_file {GB // 8}\n",
}


def test_without_a_limit_the_machine_counts(tmp_path):
    for files in ({}, V2, {**V2, "proc/cgroup": "", "proc/mountinfo": ""}):
        memory = host_memory(lay_out(tmp_path, files))
        assert memory.source == "this machine" and memory.total == psutil.virtual_memory().total
    unlimited = {**V1, "memory/jobs/mine/memory.limit_in_bytes": "9223372036854771712\n"}
    unlimited["memory/jobs/mine/memory.stat"] = "hierarchical_memory_limit 9223372036854771712\n"
    assert host_memory(lay_out(tmp_path, unlimited)).source == "this machine"


@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
@pytest.mark.parametrize("level", ["sys/jobs/mine", "sys/jobs", "sys"])
def test_the_limit_of_any_level_counts(name, level, tmp_path):
    limits = {f"{level}/{name}": f"{GB}\n", f"{level}/memory.current": f"{GB * 3 // 4}\n"}
    limits |= {f"{level}/memory.stat": f"anon 5\nactive_file {GB // 8}\ninactive_file {GB // 8}\n"}
    memory = host_memory(lay_out(tmp_path, V2 | limits))
    assert (memory.total, memory.available) == (GB, GB // 2)
    assert memory.source == f"the cgroup {tmp_path / level}"


def test_what_is_free_is_the_smallest_rest_of_any_level(tmp_path):
    tight = {"sys/jobs/mine/memory.max": f"{GB}\n"}  # a quarter used
    full = {"sys/jobs/memory.max": f"{2 * GB}\n", "sys/jobs/memory.current": f"{2 * GB - 100}\n"}
    memory = host_memory(lay_out(tmp_path, V2 | tight | full))
    assert (memory.total, memory.available) == (GB, 100)


def test_version_1_counts_file_caches_of_the_groups_below_as_free(tmp_path):
    memory = host_memory(lay_out(tmp_path, V1))
    assert (memory.total, memory.available) == (GB, GB * 3 // 4)


def test_version_1_tells_of_limits_above_that_cannot_be_seen(tmp_path):
    above = {"memory/jobs/mine/memory.stat": f"hierarchical_memory_limit {GB // 2}\n"}
    assert host_memory(lay_out(tmp_path, V1 | above)).total == GB // 2


@pytest.mark.parametrize(
    ("path", "root"), [("/docker/1234", "/docker/1234"), ("/", "/"), ("/../..", "/"), ("/other/place", "/docker/1234")]
)
def test_a_container_that_sees_only_its_own_part(path, root, tmp_path):
    files = {
        "proc/cgroup": f"0::{path}\n",
        "proc/mountinfo": f"35 22 0:32 {root} {{}}/sys ro - cgroup2 cgroup ro\n",
        "sys/memory.max": f"{GB}\n",
        "sys/cpu.max": "100000 100000\n",
    }
    proc = lay_out(tmp_path, files)
    assert host_memory(proc).total == GB and num_cpus(proc) == 1


def test_threads_follow_the_quota_of_any_level(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))
    for name, text, expected in [
        ("sys/jobs/mine/cpu.max", "250000 100000\n", 2),
        ("sys/jobs/cpu.max", "150000 50000\n", 3),
        ("sys/cpu.max", "5000 100000\n", 1),
        ("sys/jobs/cpu.max", "max 100000\n", 8),
        ("sys/jobs/cpu.max", "6400000 100000\n", 8),
    ]:
        folder = tmp_path / text.replace("\n", "") / name.replace("/", "-")
        assert num_cpus(lay_out(folder, V2 | {"sys/jobs/mine/cpu.max": "max 100000\n", name: text})) == expected
    quota = {"cpu/jobs/mine/cpu.cfs_quota_us": "400000\n", "cpu/jobs/mine/cpu.cfs_period_us": "100000\n"}
    assert num_cpus(lay_out(tmp_path / "1", V1 | quota)) == 4
    assert num_cpus(lay_out(tmp_path / "1", V1 | quota | {"cpu/jobs/mine/cpu.cfs_quota_us": "-1\n"})) == 8


def test_kills_are_counted_by_cgroup(tmp_path):
    events = {"sys/jobs/mine/memory.events": "low 0\noom 3\noom_kill 2\n", "sys/memory.events": "oom_kill 5\n"}
    counts = oom_kills(lay_out(tmp_path / "2", V2 | events))
    assert sorted(counts.values()) == [2, 5]
    control = {"memory/jobs/mine/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"}
    assert list(oom_kills(lay_out(tmp_path / "1", V1 | control)).values()) == [4]
    assert oom_kills(lay_out(tmp_path / "none", V2)) == {}


def seen(code: str, prepare: object = None, **variables: str) -> list[str]:
    """What a process prints that was prepared before it began."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=prepare)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


MEMORY = "from common.host import host_memory as m; print(m().total, m().available, m().source.replace(' ', '_'))"


@pytest.mark.parametrize(("kind", "name"), [(resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")])
def test_limits_of_the_shell_count(kind, name):
    total, available, source = seen(MEMORY, lambda: resource.setrlimit(kind, (4 * GB, 4 * GB)))
    assert (int(total), source) == (4 * GB, f"ulimit_{name}") and 3 * GB < int(available) < 4 * GB


def test_a_real_cgroup():
    with limited_cgroup(300 * 2**20) as folder:
        total, available, source = seen(MEMORY, lambda: enter(folder))
    assert int(total) == 300 * 2**20 and source == f"the_cgroup_{folder}"
    assert 200 * 2**20 < int(available) < 300 * 2**20


THREADS = """
import os
os.environ.pop("OMP_NUM_THREADS") if not os.environ["OMP_NUM_THREADS"] else None
import common
from common.environment import said_of_threads
print(os.environ.get("OMP_NUM_THREADS"), len(said_of_threads()))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one processor is no more than the quota")
def test_torch_gets_as_many_threads_as_the_quota_unless_the_user_says_otherwise():
    assert seen(THREADS, OMP_NUM_THREADS="") == ["None", "0"]
    with one_cpu_cgroup() as folder:
        assert seen(THREADS, lambda: enter(folder), OMP_NUM_THREADS="") == ["1", "1"]
        assert seen(THREADS, lambda: enter(folder), OMP_NUM_THREADS="2") == ["2", "0"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_memory_that_nothing_uses_is_given_back_whatever_lies_above_it():
    large = torch.ones(8 * 2**20)  # once freed, smaller tensors come from the heap
    del large
    holes = [torch.ones(2**18) for _ in range(200)]  # 1 MiB each
    pins = holes[::2]
    del holes
    before = psutil.Process().memory_info().rss
    give_back_memory()
    assert before - psutil.Process().memory_info().rss > 80 * 2**20
    assert all(each.sum() == 2**18 for each in pins)
