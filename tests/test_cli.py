"""What a person sees: one line that names value, rule and next step, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raypipe.cli import COMMANDS, guarded, main
from raypipe.errors import StoreError, WorkerFailed, together


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Subject 01 with six training images."""
    folder = tmp_path / "data" / "subj01" / "training_split" / "training_images"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
        image.save(folder / f"train-{i + 1:04d}_nsd-{i:05d}.png")
    return tmp_path / "data"


def extract(data_dir: Path, out: Path, *more: str) -> int:
    flags = [
        *("--data-dir", str(data_dir), "--output-dir", str(out), "--runner", "local"),
        *("--device", "cpu", "--backbone", "resnet18", "--weights", "random:0", *more),
    ]
    return main(["extract", *flags])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that begins with our name."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("raypipe: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--subj", "09"], 2, ["subj09", "subj01"]),
        (["--backbone", "dinov2q"], 2, ["dinov2q", "nearest: dinov2_q"]),
        (["--backbone", "timm:vit_bas_patch14_dinov2"], 2, ["nearest", "vit_base_patch14"]),
        (["--weights", "pretrained"], 2, ["resnet18", "--weights FILE"]),
        (["--weights", "random:x"], 2, ["random:x", "random:0"]),
        (["--weights", "/nowhere/w.pth"], 2, ["/nowhere/w.pth"]),
        (["--device", "cuda"], 2, ["--device cuda", "--device cpu"]),
        (["--workers", "3"], 2, ["--workers 3", "--runner ray"]),
        (["--batch-size", "0"], 2, ["--batch-size 0", "1 or more"]),
        (["--layer", "layer2"], 2, ["--layer", "timm:NAME"]),
        (["--split", "test"], 2, ["test_images"]),
    ],
)
def test_wrong_input_exits_2_and_writes_nothing(
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    words: list[str],
) -> None:
    assert extract(data_dir, tmp_path / "out", *flags) == code
    line = error_line(capsys)
    for word in words:
        assert word in line
    assert not list((tmp_path / "out").rglob("*.npy*"))


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extract(tmp_path / "nope", tmp_path / "out") == 2
    assert f"{tmp_path / 'nope'} does not exist" in error_line(capsys)


def test_a_store_of_another_configuration_is_refused_by_its_fields(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert extract(data_dir, out) == 0
    assert extract(data_dir, out) == 0, "the same command finds its work done"
    capsys.readouterr()
    before = (out / "resnet18_layer4" / "01" / "train.npy").read_bytes()
    assert extract(data_dir, out, "--weights", "random:1") == 2
    line = error_line(capsys)
    assert "random:0" in line
    assert "random:1" in line
    assert "--overwrite" in line
    assert (out / "resnet18_layer4" / "01" / "train.npy").read_bytes() == before
    assert extract(data_dir, out, "--weights", "random:1", "--overwrite") == 0
    assert (out / "resnet18_layer4" / "01" / "train.npy").read_bytes() != before


def test_store_commands_tell_and_check(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    extract(data_dir, out)
    capsys.readouterr()
    assert main(["store", "info", str(out)]) == 0
    told = capsys.readouterr().out
    assert "sealed  (6, 49, 512) float16" in told
    assert main(["store", "info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [6, 49, 512]
    assert main(["store", "verify", str(out)]) == 0
    path = out / "resnet18_layer4" / "01" / "train.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    capsys.readouterr()
    assert main(["store", "verify", str(out)]) == 2
    captured = capsys.readouterr()
    assert "DAMAGED  rows [0, 6) differ" in captured.out
    assert "1 of 1 shards are damaged" in captured.err
    assert main(["store", "info", str(tmp_path / "none")]) == 2


def test_flags_and_a_config_file_make_the_same_run(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data_dir: {data_dir}\noutput_dir: {tmp_path / 'a'}\nbackbone: resnet18\n"
        "weights: random:0\ndevice: cpu\nrunner: local\n"
    )
    assert main(["extract", "--config", str(file)]) == 0
    assert extract(data_dir, tmp_path / "b") == 0
    store = Path("resnet18_layer4") / "01" / "train.npy"
    assert (tmp_path / "a" / store).read_bytes() == (tmp_path / "b" / store).read_bytes()
    saved = next((tmp_path / "b" / "runs").glob("*/config.yaml"))
    assert "runner: local" in saved.read_text()
    assert main(["extract", "--config", str(saved)]) == 0


@pytest.mark.parametrize(
    ("args", "nearest"),
    [(["extrac"], "extract"), (["store", "inf"], "store info"), (["store"], "")],
)
def test_an_unknown_command_offers_the_nearest(
    args: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    assert nearest in error_line(capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: raypipe {name}" in capsys.readouterr().out


def test_a_group_of_commands_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "--help"]) == 0
    out = capsys.readouterr().out
    assert "store verify" in out
    assert "encode fit" not in out


def test_no_command_shows_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(cfg: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raypipe.store.commands.info", stopped)
    assert main(["store", "info", "."]) == 130
    assert "same command resumes" in error_line(capsys)


INTERRUPTED_IMPORT = """
import runpy, signal, sys

class CtrlC:
    def find_spec(self, name, *_):
        if name == "raypipe.launch":
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, CtrlC())
sys.argv = ["raypipe", "--version"]
runpy.run_module("raypipe", run_name="__main__")
"""


def test_ctrl_c_while_importing_is_one_line_and_130() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130
    (line,) = done.stderr.splitlines()
    assert line.startswith("raypipe: interrupted")
    assert done.stdout == ""


def test_errors_of_one_moment_are_one_line_by_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    def act() -> None:
        raise together([StoreError("x is cut short"), WorkerFailed("y: node B is gone")])

    assert guarded(act) == StoreError.exit_code
    assert error_line(capsys) == "raypipe: x is cut short; also: y: node B is gone"
