"""deploy/slurm-fmri.sh with stand-ins for srun and raypipe: arguments, environment, exit code, tidiness."""

from __future__ import annotations

import getpass
import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm-fmri.sh"

SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do echo "srun $1"; shift; done\nexec "$@"\n'
RAYPIPE = (
    '#!/bin/bash\nprintf "arg <%s>\\n" "$@"\necho "cache $RAYPIPE_CACHE_DIR"\n'
    'echo "threads $OMP_NUM_THREADS"\nmkdir -p "$RAY_TMPDIR"\nexit 3\n'
)


def submit(tmp_path: Path, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("srun", SRUN), ("raypipe", RAYPIPE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "SLURM_CPUS_PER_TASK": "6",
        "SLURM_TMPDIR": str(tmp_path / "node disk"),
        "RAY_TMPDIR": str(tmp_path / "ray"),
        **more,
    }
    return subprocess.run(["bash", SCRIPT, *args], env=env, capture_output=True, text=True)


def test_options_pass_whole_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    done = submit(tmp_path, "mvpa", "--roi", "V 1=a b.nii", "--delay-s", "5")
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    assert "srun --cpus-per-task=6" in lines
    wanted = ["fmri", "mvpa", "--roi", "V 1=a b.nii", "--delay-s", "5"]
    assert [line for line in lines if line.startswith("arg")] == [f"arg <{x}>" for x in wanted]
    assert f"cache {tmp_path}/node disk/raypipe-voxels-{getpass.getuser()}" in lines
    assert "threads 1" in lines
    assert not (tmp_path / "ray").exists(), "Ray's folder goes with the job"


def test_a_stated_cache_is_kept_and_no_command_is_bad_usage(tmp_path: Path) -> None:
    done = submit(tmp_path, "roi", RAYPIPE_CACHE_DIR="/scratch/voxels")
    assert "cache /scratch/voxels" in done.stdout
    assert submit(tmp_path).returncode == 2
