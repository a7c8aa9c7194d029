"""A node's limits from fake roots: cgroup v1, v2, both, nested, in containers; Slurm's variables."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from raypipe.errors import ConfigError
from raypipe.memory.limits import available_bytes, node_limits

GIB = 1024**3
V1_NONE = 9223372036854771712  # what v1 says for "no limit"


def fake_root(
    root: Path, cgroup: str = "", mounts: str = "", files: dict[str, object] | None = None
) -> Path:
    """A machine of 32 GiB, 20 GiB of it available."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    meminfo = f"MemTotal: {32 * 1024**2} kB\nMemFree: 1 kB\nMemAvailable: {20 * 1024**2} kB\n"
    (root / "proc/meminfo").write_text(meminfo)
    (proc / "cgroup").write_text(cgroup)
    if mounts:
        (proc / "mountinfo").write_text(mounts)
    for name, value in (files or {}).items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    return root


def test_this_machine_agrees_with_psutil() -> None:
    limits = node_limits({})
    assert limits.physical_bytes == psutil.virtual_memory().total
    assert limits.shm_bytes == psutil.disk_usage("/dev/shm").total
    assert 0 < limits.limit_bytes <= limits.physical_bytes
    assert available_bytes() <= psutil.virtual_memory().available + GIB // 4


def test_no_bounds_is_physical_memory(tmp_path: Path) -> None:
    limits = node_limits({}, fake_root(tmp_path, "0::/\n"))
    assert (limits.limit_bytes, limits.limit_source) == (32 * GIB, "physical memory")
    assert limits.cgroup_bytes is limits.slurm_bytes is limits.slurm_tasks is None
    assert limits.shm_bytes == limits.shm_free_bytes == 0


@pytest.mark.parametrize("smallest", ["a", "a/b", "a/b/c"])
def test_v2_nested_the_smallest_on_the_way_up(tmp_path: Path, smallest: str) -> None:
    base = "sys/fs/cgroup"
    files: dict[str, object] = {
        f"{base}/{name}/memory.max": "max" for name in ("a", "a/b", "a/b/c")
    }
    files[f"{base}/a/b/other/memory.max"] = GIB  # a neighbour: not ours
    root = fake_root(
        tmp_path, "0::/a/b/c\n", files=files | {f"{base}/{smallest}/memory.max": 6 * GIB}
    )
    limits = node_limits({}, root)
    assert (limits.cgroup_bytes, limits.limit_source) == (6 * GIB, "cgroup")


def test_v1_with_other_controllers_and_unlimited(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    cgroup = "9:name=systemd:/x\n4:cpuset,memory:/slurm/job_1/step_0\n3:cpu:/small\n"
    files = {
        f"{base}/memory.limit_in_bytes": V1_NONE,
        f"{base}/slurm/job_1/memory.limit_in_bytes": 12 * GIB,
        f"{base}/slurm/job_1/step_0/memory.limit_in_bytes": V1_NONE,
    }
    assert node_limits({}, fake_root(tmp_path, cgroup, files=files)).cgroup_bytes == 12 * GIB


def test_v1_a_hidden_group_above_speaks_through_the_hierarchical_limit(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    files = {
        f"{base}/memory.limit_in_bytes": V1_NONE,
        f"{base}/memory.stat": f"cache 1\nhierarchical_memory_limit {5 * GIB}",
    }
    assert node_limits({}, fake_root(tmp_path, "4:memory:/\n", files=files)).cgroup_bytes == 5 * GIB


def test_both_versions_at_once_by_mountinfo(tmp_path: Path) -> None:
    mounts = (
        "32 31 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu\n"
        "35 31 0:32 / /cg/my\\040memory rw,relatime shared:3 - cgroup cgroup rw,memory\n"
        "41 31 0:38 / /cg/unified rw - cgroup2 cgroup2 rw\n"
    )
    files = {
        "cg/my memory/job/memory.limit_in_bytes": 7 * GIB,
        "cg/unified/job/memory.max": 9 * GIB,
    }
    root = fake_root(tmp_path, "4:memory:/job\n0::/job\n", mounts, files)
    assert node_limits({}, root).cgroup_bytes == 7 * GIB


@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/deeper", "/", "/../elsewhere"])
def test_in_a_container_the_mount_begins_at_its_own_group(tmp_path: Path, path: str) -> None:
    mounts = "41 31 0:38 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    root = fake_root(tmp_path, f"0::{path}\n", mounts, {"sys/fs/cgroup/memory.max": 3 * GIB})
    assert node_limits({}, root).cgroup_bytes == 3 * GIB


def test_a_limit_above_the_machine_does_not_count(tmp_path: Path) -> None:
    root = fake_root(tmp_path, "0::/\n", files={"sys/fs/cgroup/memory.max": 64 * GIB})
    limits = node_limits({}, root)
    assert (limits.limit_bytes, limits.limit_source) == (32 * GIB, "physical memory")


def test_available_by_machine_and_by_group(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/job"
    files: dict[str, object] = {
        f"{base}/memory.max": 8 * GIB,
        f"{base}/memory.current": 7 * GIB,
        f"{base}/memory.stat": f"anon 5\ninactive_file {3 * GIB}\nactive_file 1",
    }
    assert available_bytes(fake_root(tmp_path / "v2", "0::/job\n", files=files)) == 4 * GIB
    assert available_bytes(fake_root(tmp_path / "none", "")) == 20 * GIB
    base = "sys/fs/cgroup/memory/job"
    files = {
        f"{base}/memory.limit_in_bytes": 8 * GIB,
        f"{base}/memory.usage_in_bytes": 9 * GIB,
        f"{base}/memory.stat": "total_inactive_file 0",
    }
    assert available_bytes(fake_root(tmp_path / "v1", "2:memory:/job\n", files=files)) == 0


# ---- Slurm


@pytest.mark.parametrize(
    ("environ", "size", "source"),
    [
        ({"SLURM_MEM_PER_NODE": "16384"}, 16 * GIB, "SLURM_MEM_PER_NODE"),
        ({"SLURM_MEM_PER_NODE": "16G"}, 16 * GIB, "SLURM_MEM_PER_NODE"),
        ({"SLURM_MEM_PER_NODE": "0"}, 32 * GIB, "SLURM_MEM_PER_NODE"),  # --mem=0: all of it
        (
            {"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "6"},
            12 * GIB,
            "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE",
        ),
        (
            {"SLURM_MEM_PER_GPU": "4096", "SLURM_GPUS_ON_NODE": "2"},
            8 * GIB,
            "SLURM_MEM_PER_GPU x SLURM_GPUS_ON_NODE",
        ),
        ({"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": ""}, None, "physical memory"),
    ],
)
def test_slurm_memory(
    tmp_path: Path, environ: dict[str, str], size: int | None, source: str
) -> None:
    limits = node_limits(environ, fake_root(tmp_path))
    assert limits.slurm_bytes == size
    expected = "physical memory" if size == 32 * GIB else source  # on a tie the machine is named
    assert limits.limit_source == expected


@pytest.mark.parametrize(
    ("environ", "tasks"),
    [
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "9"}, 4),
        ({"SLURM_TASKS_PER_NODE": "2(x3)"}, 2),
        ({"SLURM_TASKS_PER_NODE": "2(x3),1"}, 2),
        ({"SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 1),
        ({"SLURM_TASKS_PER_NODE": "1,5", "SLURM_NODEID": "0"}, 1),
        ({"SLURM_TASKS_PER_NODE": "1,5"}, 5),
        ({"SLURM_TASKS_PER_NODE": "1,5", "SLURM_NODEID": "7"}, 5),
        ({}, None),
    ],
)
def test_slurm_tasks(tmp_path: Path, environ: dict[str, str], tasks: int | None) -> None:
    assert node_limits(environ, fake_root(tmp_path)).slurm_tasks == tasks


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"SLURM_MEM_PER_NODE": "lots"}, "SLURM_MEM_PER_NODE='lots'"),
        ({"SLURM_MEM_PER_CPU": "100"}, "SLURM_CPUS_ON_NODE is not"),
        ({"SLURM_TASKS_PER_NODE": "two"}, "SLURM_TASKS_PER_NODE='two'"),
        ({"SLURM_NTASKS_PER_NODE": "0"}, "above 0"),
        ({"SLURM_TASKS_PER_NODE": "2(x3"}, "no count"),
    ],
)
def test_what_slurm_never_writes_is_refused(
    tmp_path: Path, environ: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        node_limits(environ, fake_root(tmp_path))
    assert said in str(error.value)


def test_shm_is_measured(tmp_path: Path) -> None:
    root = fake_root(tmp_path)
    (root / "dev/shm").mkdir(parents=True)
    limits, disk = node_limits({}, root), os.statvfs(root)
    assert limits.shm_bytes == disk.f_frsize * disk.f_blocks
