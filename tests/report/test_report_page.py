"""Plots that hold what they are given, and a page that stands alone, of whatever a run saved."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt
from raypipe.report import build_report, plots
from raypipe.report.blocks import Note, Page, Section, Table
from raypipe.report.commands import ReportConfig, report
from raypipe.report.html import render
from raypipe.report.saved import read_metrics, subject_folders, write_json, write_npy
from raypipe.report.sections import learning

RNG = np.random.default_rng(0)


def steps(n: int = 6) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(n):
        records.append({"kind": "step", "global_step": step, "loss": 2.0 / (step + 1), "lr": 0.1})
        if step % 3 == 2:
            val = {"val_loss": 1.0 / (step + 1), "val_r": 0.1 * step, "val_r_lh": None}
            last = step == n - 1
            records.append({"kind": "epoch", "global_step": step + 1, **val, "best": not last})
    return records


def save_run(folder: Path, *, evaluated: bool = True, subject: str = "01", **fields: Any) -> Path:
    """A run folder as raypipe leaves it, with one ROI."""
    record = {
        "kind": "encode fit",
        "subject": subject,
        "raypipe": "0.1.0",
        "config": {"feature": "toy", "encoder": {"model": "linear", "linear_pool": "mean"}},
        "features": {"path": "/f", "shape": [3, 4], "identity": {"weights": "random:0"}},
        "result": {"best_val_r": 0.25, "best_val_loss": 0.5, "best_epoch": 0, "seconds": 3.0},
        **fields,
    }
    write_json(folder / "run.json", record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in steps()))
    if evaluated:
        save_scores(folder / "evaluation" / "test")
    return folder


def save_scores(folder: Path) -> None:
    folder.mkdir(parents=True)
    vertices = {
        "hemi": ["lh", "lh", "rh", "rh"],
        "vertex": [0, 1, 0, 1],
        "r": [0.5, None, 0.25, -0.5],
        "nc": [0.5, 0.5, None, 0.0],
        "rois": [["f/A"], ["f/A", "streams/early"], [], ["streams/early"]],
    }
    pq.write_table(pa.table(vertices), folder / "vertices.parquet")
    base = {"q25_r": 0.1, "q75_r": 0.4, "median_r": 0.3, "n_scored": 1, "mean_ceiling_r": 0.7}
    rois = [
        {"hemi": "lh", "family": "f", "roi": "A", "n_vertices": 2, "mean_r": 0.5, **base},
        {"hemi": "rh", "family": "f", "roi": "A", "n_vertices": 0, "mean_r": None, **base},
        {"hemi": "rh", "family": "none", "roi": "none", "n_vertices": 2, "mean_r": 0.2, **base},
    ]
    pq.write_table(pa.Table.from_pylist(rois), folder / "rois.parquet")
    summary = {
        "n_images": 9, "n_scored": 3, "mean_r": 0.4567, "recovered": 0.875, "n_explainable": 2,
        "mean_ceiling_r": 0.7, "mean_r_explainable": 0.61,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)


class Links(HTMLParser):
    """Everything that a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.anchors: list[str] = []
        self.ids: list[str] = []
        self.alts: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "action", "data"):
                self.fetched.append(value or "")
            elif name == "href":
                self.anchors.append(value or "")
            elif name == "id":
                self.ids.append(value or "")
            elif name == "alt":
                self.alts.append(value or "")
        assert tag not in ("script", "link", "iframe", "object")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(path: Path) -> Links:
    found = Links()
    found.feed(path.read_text(encoding="utf-8"))
    return found


# ---- the page


def test_the_page_stands_alone_and_says_the_result(tmp_path: Path) -> None:
    page = parse(build_report(save_run(tmp_path)))
    assert page.fetched and all(src.startswith("data:image/png;base64,") for src in page.fetched)
    assert all(href.startswith("#") and href[1:] in page.ids for href in page.anchors)
    assert len(page.alts) == len(page.fetched) and all(page.alts)
    text = " ".join(page.text)
    assert "0.457" in text and "88%" in text and "random weights" in text
    raw = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://", raw) and "url(" not in raw and "@import" not in raw


def test_the_same_files_are_the_same_page(tmp_path: Path) -> None:
    save_run(tmp_path)
    first = build_report(tmp_path).read_bytes()
    assert build_report(tmp_path).read_bytes() == first


def test_several_subjects_on_one_page_and_one_that_has_not_begun(tmp_path: Path) -> None:
    for subject in ("01", "02"):
        save_run(tmp_path / f"subj{subject}", subject=subject, evaluated=subject == "01")
    names = {"01": "subj01", "02": "subj02", "03": "subj03"}
    write_json(tmp_path / "run.json", {"kind": "encode fit", "subjects": names, "config": {}})
    text = " ".join(parse(build_report(tmp_path)).text)
    assert "Subject 01 · Prediction" in text and "Subject 02 · Training" in text
    assert "Subject 02 · Prediction" not in text and "not evaluated yet" in text
    assert subject_folders(tmp_path)["02"] == tmp_path / "subj02"


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"kind": "encode fit", "subject": "01", "result": None})
    text = " ".join(parse(build_report(tmp_path)).text)
    assert "no epoch finished yet" in text


def test_scores_of_an_older_epoch_are_marked(tmp_path: Path) -> None:
    save_run(tmp_path)
    file = tmp_path / "evaluation/test/summary.json"
    for epoch, marked in ((0, False), (3, True)):
        write_json(file, {**json.loads(file.read_text()), "checkpoint": "best", "epoch": epoch})
        text = " ".join(parse(build_report(tmp_path)).text)
        assert ("evaluate again" in text) == marked


def test_what_came_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    save_run(tmp_path, notes=[evil], command=[evil], subject=evil, host='"><img src=x>')
    page = parse(build_report(tmp_path))  # parse() refuses a script
    assert evil in "".join(page.text)
    assert all(src.startswith("data:") for src in page.fetched)


def test_the_command_is_shown_as_it_is_typed(tmp_path: Path) -> None:
    save_run(tmp_path, command=["__main__.py", "encode", "fit", "--run-dir", "my run"])
    text = " ".join(parse(build_report(tmp_path)).text)
    assert "raypipe encode fit --run-dir 'my run'" in text and "__main__" not in text
    save_run(tmp_path, command=["encode_fit.py", "--subj", "01"], evaluated=False)
    assert "encode_fit.py --subj 01" in " ".join(parse(build_report(tmp_path)).text)


def test_undefined_correlations_are_said(tmp_path: Path) -> None:
    save_run(tmp_path)
    file = tmp_path / "evaluation/test/summary.json"
    write_json(file, {**json.loads(file.read_text()), "n_vertices": 1234, "n_counted_zero": 1100})
    text = " ".join(parse(build_report(tmp_path)).text)
    assert "undefined in 1,231 more" in text
    assert "1,100 of them undefined and counted as 0" in text


def test_blocks_that_sections_do_not_use_yet() -> None:
    table = Table(["a", "b"], [["x", "1"]], "open table")
    html = render(Page("t", "s", [Section("One & two", [Note("n"), table])]))
    assert "open table" in html and '<td class="number">1</td>' in html and "One &amp; two" in html


def test_no_run_or_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="run folder"):
        build_report(tmp_path)
    with pytest.raises(MissingInput):
        build_report(tmp_path / "none")
    (tmp_path / "run.json").write_text('{"kind": ')
    with pytest.raises(StoreCorrupt, match="not JSON"):
        build_report(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path, evaluated=False)
    assert report(ReportConfig(run_dir=tmp_path)) == tmp_path / "report.html"
    assert report(ReportConfig(run=tmp_path)) == tmp_path / "report.html"
    with pytest.raises(ConfigError, match="one run folder"):
        ReportConfig(run=tmp_path, run_dir=tmp_path)
    assert "report.html" in capsys.readouterr().out


# ---- saved files


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_metrics(tmp_path) == [{"a": 1}, {"a": 2}]


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_arrays_come_back(tmp_path: Path) -> None:
    array = RNG.standard_normal((3, 2)).astype(np.float32)
    np.testing.assert_array_equal(np.load(write_npy(tmp_path / "new" / "a.npy", array)), array)


# ---- curves and plots


def test_curves_of_records() -> None:
    curves = learning(steps())
    assert curves is not None
    assert curves.step.tolist() == [1, 2, 3, 4, 5, 6] and curves.epoch_end.tolist() == [3, 6]
    assert curves.best_epoch == 0 and np.isnan(curves.val["val_r_lh"]).all()
    assert learning([]) is None
    begun = learning(steps(2))
    assert begun is not None and begun.val == {} and begun.best_epoch is None


def pixels(figure: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(plots.png(figure, 60))).convert("RGB"))


def test_every_figure_is_drawn_twice_alike_and_leaves_no_state() -> None:
    before = dict(matplotlib.rcParams)
    r = {"lh": RNG.uniform(-1, 1, 500), "rh": np.array([0.1, np.nan])}
    ceiling = {"lh": RNG.uniform(0, 1, 500), "rh": np.array([0.5, 0.5])}
    rows = [plots.RoiValues(hemi="lh", roi="A", family="f", r=r["lh"], ceiling_r=0.5)]
    for draw in (
        lambda: plots.learning_curves(learning(steps())),  # type: ignore[arg-type]
        lambda: plots.learning_curves(learning(steps(2))),  # type: ignore[arg-type]
        lambda: plots.roi_bars(rows),
        lambda: plots.vertex_histogram(r, ceiling),
        lambda: plots.vertex_histogram(r),
    ):
        assert plots.png(draw(), 60) == plots.png(draw(), 60)
        assert (pixels(draw()) < 250).any()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("values", [[], [np.nan], [0.3], [1.0, 1.0]])
def test_odd_values_are_drawn(values: list[float]) -> None:
    array = np.array(values, float)
    plots.png(plots.vertex_histogram({"lh": array}, {"lh": np.ones_like(array)}), 60)
    row = plots.RoiValues(hemi="rh", roi="A", family="f", r=array, ceiling_r=None)
    plots.png(plots.roi_bars([row]), 60)


def test_the_bar_is_as_long_as_the_mean() -> None:
    def row(hemi: str, mean: float) -> plots.RoiValues:
        return plots.RoiValues(hemi=hemi, roi="A", family="f", r=np.array([mean - 0.1, mean + 0.1]))

    axes = plots.roi_bars([row("lh", 0.25), row("rh", 0.5)]).axes[0]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([0.25, 0.5])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A"]


def test_text_keeps_clear_of_text() -> None:
    """No two ROI names overlap, and none is smaller than 9 points."""
    rows = [
        plots.RoiValues(hemi=h, roi=f"ROI-{i}", family=f"fam{i // 5}", r=RNG.uniform(0, 1, 30))
        for i in range(25)
        for h in ("lh", "rh")
    ]
    figure = plots.roi_bars(rows)
    figure.canvas.draw()
    labels = figure.axes[0].get_yticklabels()
    boxes = sorted(label.get_window_extent().y0 for label in labels)
    heights = max(label.get_window_extent().height for label in labels)
    assert min(np.diff(boxes)) > heights
    assert min(label.get_fontsize() for label in labels) >= 9
