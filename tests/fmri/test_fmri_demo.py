"""The fMRI demonstration: its verdict on paper, and the whole of it in this process."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from raypipe.demo import DemoConfig, NotRecovered, demo
from raypipe.demo import fmri as job
from raypipe.demo.fmri import Verdict, verdicts
from raypipe.fmri.ledger import DONE, Ledger
from raypipe.launch import LaunchConfig, open_runner


def _verdict(**changed) -> Verdict:
    fields = {"roi": "fusiform", "target": "all", "planted": True, "score": 0.7, "chance": 0.25}
    return Verdict(**{**fields, "q": 0.001, "subjects": 6, "below": 6, **changed})


@pytest.mark.parametrize(
    ("q", "below", "found"), [(0.001, 6, True), (0.001, 4, True), (0.001, 3, False),
                              (0.06, 6, False), (float("nan"), 6, False)],
)  # fmt: skip
def test_found_is_what_group_and_subjects_agree_on(q: float, below: int, found: bool) -> None:
    for planted in (True, False):
        one = _verdict(q=q, below=below, planted=planted)
        assert one.found == found
        assert one.right == (found == planted)
        assert ("WRONG" in one.line()) == (found != planted)


def test_verdicts_are_of_accuracy_and_count_subjects() -> None:
    group = [
        {"roi": roi, "target": "all", "score": score, "mean": 0.5, "chance": 0.25, "q": 0.01}
        for roi in ("fusiform", "motor")
        for score in ("accuracy", "roc_auc")
    ]
    records = [
        {"roi": roi, "target": "all", "p": {"accuracy": p, "roc_auc": 0.5}}
        for roi, p in [("fusiform", 0.01), ("fusiform", 0.2), ("motor", 0.5), ("motor", 0.6)]
    ]
    found = verdicts(group, records)
    assert [(one.roi, one.planted, one.below, one.subjects) for one in found] == [
        ("fusiform", True, 1, 2), ("motor", False, 0, 2),
    ]  # fmt: skip


def _run(out: Path, **smaller: int) -> None:
    with open_runner(LaunchConfig(runner="local")) as runner:
        demo(DemoConfig(job="fmri", out=out, **smaller), runner)


@pytest.mark.slow
def test_the_demo_finds_what_is_planted_and_resumes(tmp_path: Path, capsys) -> None:
    _run(tmp_path)
    assert "12 of 12 as planted" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") == 8  # scores, confusions, a map a target; time, memory
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/units").iterdir()}
    assert len(before) == 2 * 72
    _run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert all(record["status"] == DONE for record in Ledger(tmp_path / "run").all())


@pytest.mark.usefixtures("no_page")
def test_the_demo_fails_where_nothing_is_planted(tmp_path: Path, monkeypatch) -> None:
    nothing = functools.partial(job.PlantedFmriConfig, pattern_percent=0.0)
    monkeypatch.setattr(job, "PlantedFmriConfig", nothing)
    with pytest.raises(NotRecovered, match="occipital all is planted and was not found"):
        _run(tmp_path, n_subjects=3, n_permutations=40)
