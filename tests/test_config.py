"""A YAML file and flags build the same object."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from raypipe import config
from raypipe.errors import ConfigError, MissingInput, UnknownName


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-3
    clip_norm: float | None = 0.1


@dataclass(frozen=True, kw_only=True)
class Outer:
    """What it does."""

    data_dir: Path
    subj: tuple[str, ...] = ()
    amp: Literal["off", "bf16"] = "off"
    overwrite: bool = False
    train: Inner = field(default_factory=Inner)


def parse(*args: str) -> Outer:
    return config.parse(Outer, args, prog="test")


def test_flags_and_file_build_the_same_object(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data_dir: /data\nsubj: ['01', '02']\namp: bf16\noverwrite: true\n"
        "train: {lr: 0.01, clip-norm: null}\n"
    )
    flags = "--data_dir /data --subj 01 02 --amp bf16 --overwrite --lr 0.01 --clip-norm None"
    assert parse("--config", str(file)) == parse(*flags.split())
    assert parse(f"--config={file}", "--lr", "0.5").train.lr == 0.5


def test_a_saved_config_reads_back(tmp_path: Path) -> None:
    cfg = Outer(data_dir=Path("/x"), subj=("03",), train=Inner(lr=3.0, clip_norm=None))
    config.save(cfg, tmp_path / "out.yaml")
    assert parse("--config", str(tmp_path / "out.yaml")) == cfg


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such file"):
        parse("--config", str(tmp_path / "none.yaml"))
    for text, error, words in [
        ("data_dri: /x", UnknownName, "nearest: data_dir"),
        ("- a", ConfigError, "no mapping"),
        ("a: [", ConfigError, "not YAML"),
    ]:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(error, match=words):
            parse("--config", str(tmp_path / "bad.yaml"))
    with pytest.raises(ConfigError, match="names no file"):
        parse("--config")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--amp", "fp8"], ["fp8", "--amp", "'off', 'bf16'"]),
        (["--lr", "abc"], ["abc", "--lr", "float"]),
        (["--lr"], ["--lr", "Missing value"]),
        (["--lrr", "1"], ["--lrr", "--lr FLOAT"]),
        (["--subj", "y" * 200, "--over"], ["--over", "--overwrite"]),
    ],
)
def test_a_wrong_flag_is_one_line_of_value_rule_and_next_step(
    flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        parse("--data-dir", "/x", *flags)
    (line,) = str(error.value).splitlines()
    for word in (*words, "; see test --help"):
        assert word in line
    assert "│" not in line and "─" not in line
    assert capsys.readouterr().err == ""


def test_all_that_is_missing_is_named_without_its_help() -> None:
    with pytest.raises(ConfigError) as error:
        parse("--lrr", "1")
    assert str(error.value).startswith("Missing from test: --data-dir PATH; Unrecognized options: ")
    assert "(required)" not in str(error.value)


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    assert "--clip-norm" in capsys.readouterr().out


def test_a_wrong_flag_is_one_line_in_any_locale() -> None:
    """tyro draws a box, and where the locale is not UTF-8 rules of hyphens instead."""
    code = (
        "import sys; from raypipe.config import parse; from raypipe.memory.config import MemoryFlags\n"
        "try: parse(MemoryFlags, ['--bogus', '3'], prog='x')\n"
        "except Exception as error: sys.stdout.buffer.write(str(error).encode())"
    )
    for words in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **words},
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode() == "Unrecognized options: --bogus, 3; see x --help"
