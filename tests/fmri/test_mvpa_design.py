"""Which volumes are samples of what: delay, runs, trials, scrubbing; against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import ConfigError, InputError, RaypipeWarning
from raypipe.fmri import samples
from raypipe.fmri.config import MvpaJobConfig
from raypipe.fmri.mvpa import Design, design_of_events, design_of_volumes
from raypipe.fmri.units import Target
from raypipe.read.events import Events
from raypipe.read.labels import VolumeLabels
from raypipe.read.runfiles import RunFiles

LABELS = np.array(["rest", "a", "a", "rest", "b", "b", "rest", "b", "b", "rest", "a", "a"])
RUNS = np.repeat([0, 1], 6)


def test_volumes_take_the_label_of_a_delay_ago_within_their_run() -> None:
    design = design_of_volumes(LABELS, RUNS, delay_volumes=1)
    # volume 6 would take run 0's last label: it has none
    assert design.volumes.tolist() == [2, 3, 5, 8, 9, 11]
    assert design.labels.tolist() == ["a", "a", "b", "b", "b", "a"]
    assert design.runs.tolist() == [0, 0, 0, 1, 1, 1]
    assert design.blocks[0] == design.blocks[1] != design.blocks[2]
    none = design_of_volumes(LABELS, RUNS, delay_volumes=0)
    np.testing.assert_array_equal(none.volumes, np.flatnonzero(LABELS != "rest"))


def test_a_block_can_be_one_sample() -> None:
    design = design_of_volumes(LABELS, RUNS, delay_volumes=0, each="trial")
    series = np.arange(24, dtype=np.float32).reshape(2, 12) ** 2
    assert design.labels.tolist() == ["a", "b", "b", "a"]
    expected = [series[:, part].mean(1) for part in ([1, 2], [4, 5], [7, 8], [10, 11])]
    np.testing.assert_allclose(design.samples(series), expected)


def test_numbers_are_a_target_and_none_of_them_is_rest() -> None:
    design = design_of_volumes(np.arange(12) / 2, RUNS, delay_volumes=2)
    assert not design.is_classes
    assert design.labels.tolist() == [0, 0.5, 1, 1.5, 3, 3.5, 4, 4.5]
    assert design.volumes.tolist() == [2, 3, 4, 5, 8, 9, 10, 11]


def _events(*rows: tuple[float, float, str]) -> Events:
    onset, duration, kind = zip(*rows, strict=True)
    return Events(
        onset_s=np.array(onset), duration_s=np.array(duration), trial_type=np.array(kind, np.str_)
    )


def test_events_take_the_volumes_acquired_in_their_response() -> None:
    tables = [_events((0.0, 6.0, "a"), (10.0, 0.5, "b")), _events((1.0, 4.0, "b"), (100.0, 4, "a"))]
    design = design_of_events(tables, [12, 12], t_r_s=2.0, delay_s=4.0)
    expected = []
    for run, table in enumerate(tables):
        for onset, duration in zip(table.onset_s, table.duration_s, strict=True):
            middle = 2.0 * np.arange(12) + 1
            inside = (middle >= onset + 4) & (middle < onset + 4 + duration)
            expected.append((np.flatnonzero(inside) + 12 * run).tolist())
    expected[1] = [7]  # 14 to 14.5 s lies in volume 7, whose middle is at 15 s
    expected.pop()  # after the scan's end
    got = [
        design.volumes[a:b].tolist()
        for a, b in zip(design.start[:-1], design.start[1:], strict=True)
    ]
    assert got == expected
    assert design.labels.tolist() == ["a", "b", "b"]
    assert design.runs.tolist() == [0, 0, 1]
    each = design_of_events(tables, [12, 12], t_r_s=2.0, delay_s=4.0, each="volume", keep=["a"])
    assert each.volumes.tolist() == expected[0]
    assert set(each.blocks.tolist()) == {0}


def test_scrubbed_volumes_leave_their_samples() -> None:
    design = design_of_volumes(LABELS, RUNS, delay_volumes=0, each="trial")
    kept = np.setdiff1d(np.arange(12), [1, 7, 8])
    series = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
    with pytest.warns(RaypipeWarning, match="1 of 4 samples were scrubbed away"):
        left = design.left(kept)
    assert left.labels.tolist() == ["a", "b", "a"]
    expected = [series[:, part].mean(1) for part in ([2], [4, 5], [10, 11])]
    np.testing.assert_allclose(left.samples(series[:, kept]), expected, rtol=1e-6)


def test_classes_are_chosen_by_name() -> None:
    design = design_of_volumes(LABELS, RUNS, delay_volumes=0, each="trial")
    only = design.of_classes(["b"])
    assert (only.classes, only.volumes.tolist()) == (("b",), [4, 5, 7, 8])
    assert design.encoded().tolist() == [0, 1, 1, 0]
    with pytest.raises(InputError, match="class 'c' has no sample; there are a, b"):
        design.of_classes(["a", "c"])


def test_designs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="delay of -1 volumes"):
        design_of_volumes(LABELS, RUNS, delay_volumes=-1)
    with pytest.raises(InputError, match="give one of each a volume"):
        design_of_volumes(LABELS, RUNS[:-1], delay_volumes=0)
    with pytest.raises(InputError, match="the design has no sample"):
        design_of_volumes(np.repeat("rest", 12), RUNS, delay_volumes=0)
    with pytest.raises(InputError, match="1 events tables for 2 runs"):
        design_of_events([_events((0, 1, "a"))], [12, 12], t_r_s=2, delay_s=4)
    design = design_of_volumes(LABELS, RUNS, delay_volumes=0)
    with pytest.raises(InputError, match="names volume 11, the series has 9"):
        design.samples(np.zeros((2, 9), np.float32))
    one = np.zeros(1, np.int64)
    with pytest.raises(InputError, match="has no volume"):
        Design(
            labels=np.array(["a"]), runs=one, blocks=one, start=np.array([0, 0]), volumes=one[:0]
        )
    with pytest.raises(InputError, match="not finite"):
        Design(labels=np.array([np.nan]), runs=one, blocks=one, start=np.array([0, 1]), volumes=one)


@given(half_delay=st.integers(1, 20), t_r_s=st.sampled_from([1.0, 2.0, 3.0, 4.0]))
def test_labels_are_delayed_as_events_are(half_delay: int, t_r_s: float) -> None:
    """One row a volume against the same blocks as events; the delay may end on half a volume."""
    delay_s, n = half_delay / 2, 40
    shown = np.array(["rest"] * n, np.str_)
    shown[[2, 3, 10, 11]] = ["a", "a", "b", "b"]
    table = _events((2 * t_r_s, 2 * t_r_s, "a"), (10 * t_r_s, 2 * t_r_s, "b"))
    of_events = design_of_events([table], [n], t_r_s=t_r_s, delay_s=delay_s, each="volume")
    run = RunFiles(subject="01", bold=Path("bold.nii.gz"))
    cfg = MvpaJobConfig(
        table=Path("runs.csv"), run_dir=Path("run"), labels="labels.txt", delay_s=delay_s
    )
    with pytest.MonkeyPatch.context() as patched:
        found = VolumeLabels(labels=shown, runs=np.array(["1"] * n))
        patched.setattr(samples, "read_labels", lambda path, column: found)
        of_labels = samples.design_of(cfg, Target(name="all"), [run], [n], t_r_s)
    assert of_labels.volumes.tolist() == of_events.volumes.tolist()
    assert of_labels.labels.tolist() == of_events.labels.tolist()
