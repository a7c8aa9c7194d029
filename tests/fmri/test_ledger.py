"""The unit ledger: a crash at any step leaves a unit done with the right files, or not done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_kit import unit

from raypipe.fmri.ledger import Ledger, write_whole


class Crash(BaseException):
    """kill -9: nothing is cleaned up, nothing runs after it."""


@contextmanager
def dying_after(steps: int) -> Iterator[None]:
    """The process dies before its ``steps``-th change of the disk (0: before the first)."""
    left = steps
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (os, "fsync"),
            (os, "unlink"),
            (os, "rename"),
            (os, "replace"),
            (os, "mkdir"),
            (Path, "open"),
            (Path, "replace"),
            (Path, "unlink"),
            (Path, "mkdir"),
        ):
            real = getattr(owner, name)

            def step(*args: object, _real: object = real, **kwargs: object) -> object:
                nonlocal left
                if left <= 0:
                    raise Crash
                left -= 1
                return _real(*args, **kwargs)  # type: ignore[operator]

            patch.setattr(owner, name, step)
        yield


def compute(ledger: Ledger, name: str, key: str, value: int) -> None:
    """As a worker does: the record goes, the files come, the record comes."""
    one = unit(name, key)
    ledger.begin(one)
    path = ledger.path(one).with_suffix(".parquet")
    write_whole(path, lambda file: file.write(f"{name} {key} {value:06d}".encode()))
    ledger.finish(one, {"value": value}, [path])


def content(ledger: Ledger, name: str, key: str) -> str:
    return ledger.path(unit(name, key)).with_suffix(".parquet").read_text()


STEPS = st.tuples(st.sampled_from(["V1", "V2"]), st.sampled_from(["k1", "k2"]), st.integers(0, 40))


@settings(max_examples=150)
@given(st.lists(STEPS, min_size=1, max_size=8))
def test_whatever_is_done_has_the_files_of_its_key(history: list[tuple[str, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        finished: dict[str, tuple[str, int]] = {}  # name -> (key, value) that was reported
        for value, (name, key, survives) in enumerate(history):
            if ledger.is_done(unit(name, key)):
                continue  # a finished unit is never computed again
            with suppress(Crash), dying_after(survives):
                compute(ledger, name, key, value)
                finished[name] = key, value
            if finished.get(name, ("", -1))[1] != value:
                finished.pop(name, None)  # it died: the one under way may be lost, or just made
            ledger.sweep()
            for other, (at, _) in finished.items():  # nothing that was reported is lost
                assert ledger.is_done(unit(other, at))
            for other in ("V1", "V2"):
                for at in ("k1", "k2"):
                    if ledger.is_done(unit(other, at)):
                        record = ledger.read(unit(other, at))
                        assert record is not None
                        assert content(ledger, other, at) == f"{other} {at} {record['value']:06d}"
        assert not list(Path(folder).rglob("*.tmp"))


def test_every_crash_point_of_a_change_of_options_is_met(tmp_path: Path) -> None:
    outcomes = set()
    for survives in range(60):
        ledger = Ledger(tmp_path / f"{survives}")
        compute(ledger, "V1", "old", 1)
        try:
            with dying_after(survives):
                compute(ledger, "V1", "new", 2)
            outcomes.add("finished")
        except Crash:
            outcomes.add("crashed")
        old, new = ledger.is_done(unit("V1", "old")), ledger.is_done(unit("V1", "new"))
        assert not (old and new)
        if old or new:
            key, value = ("old", 1) if old else ("new", 2)
            assert content(ledger, "V1", key) == f"V1 {key} {value:06d}"
        outcomes.add((old, new))
    assert outcomes == {"finished", "crashed", (True, False), (False, False), (False, True)}


def test_another_key_a_failure_or_a_missing_file_is_not_done(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    compute(ledger, "V1", "k1", 1)
    assert ledger.is_done(unit("V1", "k1"))
    assert not ledger.is_done(unit("V1", "k2"))
    ledger.path(unit("V1")).with_suffix(".parquet").write_text("short")
    assert not ledger.is_done(unit("V1", "k1"))
    ledger.fail(unit("V2"), "scan x is not there")
    assert not ledger.is_done(unit("V2"))
    record = ledger.read(unit("V2"))
    assert record is not None
    assert record["reason"] == "scan x is not there"
    ledger.path(unit("V1")).write_text('{"torn": ')
    assert ledger.read(unit("V1")) is None
    assert [one["roi"] for one in ledger.all()] == ["V2"]
