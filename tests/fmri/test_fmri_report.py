"""The fMRI page: figures hold what the records say, maps show where, and a page comes of any run folder."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mvpa_kit import planted
from PIL import Image
from scipy import stats

from raypipe.cli import main
from raypipe.errors import InputError, MissingInput, StoreCorrupt
from raypipe.fmri.cohort import group_rows, save_group
from raypipe.fmri.ledger import Ledger
from raypipe.fmri.mvpa import EstimatorConfig, MvpaConfig, decode
from raypipe.fmri.report import plots, write_report
from raypipe.fmri.report.brain import cuts, draw_map, map_files, read_map
from raypipe.fmri.report.decoding import best_first
from raypipe.fmri.report.results import permuted, read_results, roi_scores
from raypipe.fmri.results import save_decoding
from raypipe.fmri.units import Unit
from raypipe.report import build_report
from raypipe.report.plots import png
from raypipe.report.saved import write_json

SUBJECTS = ("01", "02", "03")
ROIS = {"strong": 0.8, "<b>none</b>": 0.0}
AFFINE = np.diag([4.0, 4, 4, 1])
AFFINE[:3, 3] = (-78, -110, -70)


def _decode(signal: float, seed: int, permutations: int):
    patterns, design = planted(2, n_runs=3, each=6, n_voxels=12, signal=signal)
    patterns = patterns + np.random.default_rng(seed).normal(0, 1, patterns.shape)
    model = EstimatorConfig(estimator="ridge_classifier")
    return decode(patterns, design, MvpaConfig(model=model, n_permutations=permutations))


@pytest.fixture(scope="module")
def units() -> dict:
    """(subject, roi) -> a decoding; a hundred permutations each."""
    return {
        (subject, roi): _decode(signal, 10 * i + j, 100)
        for i, subject in enumerate(SUBJECTS)
        for j, (roi, signal) in enumerate(ROIS.items())
    }


def _save(run_dir: Path, units: dict, **fields) -> Path:
    """A run folder as ``fmri mvpa`` leaves it."""
    ledger, names = Ledger(run_dir), []
    for (subject, roi), result in units.items():
        unit = Unit(subject=subject, roi=roi, target="cat-face", key="k")
        ledger.begin(unit)
        table = save_decoding(ledger.path(unit).with_suffix(".parquet"), unit, result)
        told = result.to_dict()
        told.pop("null")
        told |= {
            "seconds": 1.5, "seconds_reading": 0.5, "peak_anon_bytes": 3 << 20, "warnings": ["odd"],
            "not_finite": 2, "constant": 0, "outside_mask": 1, "ways": ["cached"],
        }  # fmt: skip
        ledger.finish(unit, told, [table])
        names.append(unit.unit_id)
    records = ledger.all()
    save_group(run_dir, group_rows(records))
    run = {
        "kind": "fmri mvpa", "raypipe": "0.1.0", "units": names, "plan": ["memory: 1 worker"],
        "config": {"bids_dir": "/data", "clean": {"detrend": True}, "mvpa": {"n_permutations": 100}},
        "summary": {"computed": 6, "found": 0, "seconds": 9.0, "failed": {}},
        **fields,
    }  # fmt: skip
    write_json(run_dir / "run.json", run)
    return run_dir


class _Text(HTMLParser):
    """Cells of tables, and all text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text, self._cell = "", False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell and self.rows:
            self.rows[-1].append(data)
            self._cell = False


def test_the_numbers_of_a_figure_are_the_records(tmp_path: Path, units: dict) -> None:
    results = read_results(_save(tmp_path, units))
    rows = roi_scores(results, "cat-face", "accuracy")
    assert [row.roi for row in rows] == list(ROIS)
    for row in rows:
        own = [units[subject, row.roi] for subject in SUBJECTS]
        assert row.subjects == SUBJECTS
        np.testing.assert_allclose(row.values, [one.scores["accuracy"] for one in own])
        np.testing.assert_allclose(row.p, [one.p["accuracy"] for one in own])
        assert row.chance == 0.5
        nulls = [one.null["accuracy"] for one in own]
        every = np.mean(np.meshgrid(*nulls), axis=0).ravel()  # 100^3 combinations
        np.testing.assert_allclose(row.band, np.percentile(every, [2.5, 97.5]), atol=0.012)
        t = stats.ttest_1samp(row.values - 0.5, 0, alternative="greater")
        assert row.row["p"] == pytest.approx(t.pvalue)
    np.testing.assert_allclose(
        sorted(row.q for row in rows),
        sorted(stats.false_discovery_control([row.row["p"] for row in rows])),
    )
    for unit in results.units:
        expected = units[unit["subject"], unit["roi"]].null["accuracy"]
        np.testing.assert_array_equal(permuted(results, unit, "accuracy"), expected)


@given(st.lists(st.floats(0, 1), max_size=30))
def test_points_keep_apart_whatever_their_order(values: list[float]) -> None:
    heights = plots.spread(np.array(values))
    assert (np.abs(heights) <= 0.22).all()
    if len(set(values)) == len(values) and values:
        order = np.random.default_rng(0).permutation(len(values))
        np.testing.assert_array_equal(plots.spread(np.array(values)[order]), heights[order])


def test_the_interval_is_students() -> None:
    values = np.array([0.5, 0.7, 0.65, 0.8])
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert plots.half_interval(values) == pytest.approx((high - low) / 2)
    assert np.isnan(plots.half_interval(values[:1]))


def test_confusions_show_percent_of_each_true_class() -> None:
    counts = np.array([[3, 1], [0, 0]])
    figure = plots.confusions([plots.Confusion(title="V1", classes=("a", "b"), counts=counts)])
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "0", "0"]
    many = plots.Confusion(title="x", classes=tuple("abcdefghijkl"), counts=np.eye(12, dtype=int))
    assert (
        not plots.confusions([many] * 5).axes[0].texts
    )  # colours alone where digits would not fit


def test_of_many_regions_the_best_are_drawn_in_their_order(tmp_path: Path, units: dict) -> None:
    rows = roi_scores(read_results(_save(tmp_path, units)), "cat-face", "accuracy")
    assert best_first(rows, 2) == rows
    assert [row.roi for row in best_first(rows, 1)] == ["strong"]


def test_the_page_says_what_was_found(tmp_path: Path, units: dict) -> None:
    page = write_report(_save(tmp_path, units))
    text = page.read_text(encoding="utf-8")
    assert "<b>none" not in text  # escaped, everywhere
    assert text.count("data:image/png") == 3  # scores, confusions, time
    assert not re.search(r"https?://", text)
    shown = _Text(page)
    strong = next(row for row in shown.rows if row[:2] == ["strong", "accuracy"])
    own = [units[subject, "strong"] for subject in SUBJECTS]
    values = [one.scores["accuracy"] for one in own]
    assert strong[2:6] == ["3", f"{np.mean(values):.3f}", f"{np.std(values, ddof=1):.3f}", "0.500"]
    assert strong[-1] == f"{sum(one.p['accuracy'] < 0.05 for one in own)} of 3"
    assert "odd (6 units)" in shown.text
    assert "memory: 1 worker" in shown.text
    assert "scans read for a unit: cached 6" in shown.text


def test_a_failed_unit_is_named_and_an_older_one_left_out(tmp_path: Path, units: dict) -> None:
    summary = {
        "computed": 3,
        "found": 0,
        "seconds": 1.0,
        "failed": {"sub-09_roi-x": ["no mask", 2]},
    }
    _save(tmp_path, units, summary=summary)
    run = read_results(tmp_path).run
    ids = [name for name in run["units"] if "strong" in name]
    write_json(tmp_path / "run.json", {**run, "units": ids})
    shown = _Text(write_report(tmp_path))
    assert ["sub-09_roi-x", "no mask"] in shown.rows
    assert "1 unit(s) failed" in shown.text
    assert not any("none" in cell for row in shown.rows for cell in row[:2])


def test_an_unfinished_run_and_time_series_have_pages(tmp_path: Path, units: dict) -> None:
    _save(tmp_path / "a", units)
    run = read_results(tmp_path / "a").run
    (tmp_path / "a" / "group.json").unlink()
    write_json(tmp_path / "a" / "run.json", {k: v for k, v in run.items() if k != "summary"})
    assert "not finished" in _Text(write_report(tmp_path / "a")).text

    unit = Unit(subject="01", roi="V1", key="k")
    row = {"file": "series/x.npy", "n_voxels": 7, "n_volumes": 9, "not_finite": 0, "constant": 1,
           "scrubbed": 2, "way": "one pass"}  # fmt: skip
    cost = {"seconds": 0.0, "seconds_reading": 1.0, "peak_anon_bytes": 1, "warnings": []}
    Ledger(tmp_path / "b").begin(unit)
    Ledger(tmp_path / "b").finish(unit, {"series": [row], "n_voxels": 7, **cost}, [])
    summary = {"computed": 1, "found": 0, "seconds": 1.0, "failed": {}}
    write_json(tmp_path / "b" / "run.json", {"kind": "fmri roi", "config": {}, "summary": summary})
    shown = _Text(write_report(tmp_path / "b"))
    assert ["series/x.npy", "7", "9", "0", "1", "2", "one pass"] in shown.rows
    assert "scans read for a unit: one pass 1" in shown.text


def test_the_command_knows_the_room(tmp_path: Path, units: dict, capsys) -> None:
    _save(tmp_path, units)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert "fMRI decoding" in (tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match=r"raypipe\.fmri\.report\.write_report"):
        build_report(tmp_path)
    with pytest.raises(MissingInput):
        write_report(tmp_path / "nowhere")


def _map(run_dir: Path, name: str, values: np.ndarray, **told) -> Path:
    (run_dir / "maps").mkdir(parents=True, exist_ok=True)
    path = run_dir / "maps" / f"{name}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), AFFINE), path)
    if told:
        write_json(path.with_name(f"{name}.json"), told)
    return path


def _blob(at: tuple[int, int, int], value: float, outside: float = 0.0) -> np.ndarray:
    values = np.full((40, 50, 40), outside)
    i, j, k = at
    values[i - 2 : i + 3, j - 2 : j + 3, k - 2 : k + 3] = value
    values[at] = value * 1.001
    return values


def test_a_map_of_scores_is_read_less_chance(tmp_path: Path) -> None:
    path = _map(tmp_path, "one", _blob((12, 20, 25), 0.75, np.nan), score="accuracy", chance=0.5)
    one = read_map(path)
    values = np.asarray(one.image.dataobj)
    assert values[12, 20, 24] == pytest.approx(0.25)
    assert values[0, 0, 0] == 0
    assert one.what == "accuracy less chance (0.5)"
    assert one.extreme() == "largest 0.251 at x -30, y -30, z 30 mm"
    low, *_, high = cuts(one.image)
    assert 22 <= low < high <= 38  # where the blob is: 22 to 38 mm
    torn = tmp_path / "maps" / "torn.nii.gz"
    torn.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StoreCorrupt, match=r"torn\.nii\.gz"):
        read_map(torn)
    with pytest.raises(StoreCorrupt, match="one volume"):
        read_map(_map(tmp_path, "two", np.zeros((3, 3, 3, 2))))


@pytest.mark.parametrize(("sign", "space"), [(1, "MNI152NLin2009cAsym"), (-1, "")])
def test_a_drawn_map_shows_sign_and_side(tmp_path: Path, sign: int, space: str) -> None:
    one = read_map(_map(tmp_path, "m", _blob((28, 20, 25), 0.3 * sign), space=space, title="T"))
    assert one.standard == bool(space)
    picture = np.asarray(Image.open(io.BytesIO(png(draw_map(one), dpi=60))).convert("RGB"), int)
    picture = picture[:, : int(0.89 * picture.shape[1])]  # without the colour bar
    red = (picture[..., 0] - picture[..., 2]) > 60
    blue = (picture[..., 2] - picture[..., 0]) > 60
    strong, other = (red, blue) if sign > 0 else (blue, red)
    assert strong.sum() > 60 > 10 * other.sum()


def test_maps_of_the_group_come_first_and_an_empty_one_is_said(tmp_path: Path, units: dict) -> None:
    _save(tmp_path, units)
    _map(tmp_path, "a-subject", np.zeros((5, 5, 5)))
    _map(tmp_path, "group_x", _blob((28, 20, 25), 0.3))
    assert [path.name[:5] for path in map_files(tmp_path)] == ["group", "a-sub"]
    page = write_report(tmp_path)
    assert "a-subject.nii.gz has no value" in page.read_text()
    assert page.read_text().count("data:image/png") == 4
