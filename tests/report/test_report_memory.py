"""The section on memory and the page of an extraction, from the files that runs leave."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from raypipe.extract.config import ExtractConfig
from raypipe.memory.config import resolve
from raypipe.memory.figure import COLOURS, Kill, memory_figure
from raypipe.memory.history import read_histories
from raypipe.memory.tracker import COLUMNS
from raypipe.memory.verdict import Verdict
from raypipe.provenance import run_record
from raypipe.report import build_report
from raypipe.report.commands import ReportConfig, report
from raypipe.report.memory import memory_card, memory_section
from raypipe.report.plots import png
from raypipe.report.saved import write_json

MIB, GIB = 1024**2, 1024**3
START = 1_790_000_000.0


def log(
    folder: Path, name: str, *, top: float, budget: int | None = GIB, start: float = 0.0,
    seconds: int = 60, gpu: bool = False,
) -> None:  # fmt: skip
    """A log whose charge climbs to ``top`` MiB, with a row a second."""
    rows = [",".join([*COLUMNS, *(f"gpu0_{n}_bytes" for n in ("allocated", "reserved", "peak"))])]
    if not gpu:
        rows = [",".join(COLUMNS)]
    for i in range(seconds):
        charge = int(top * MIB * (1 - math.exp(-i / 8)) * (0.85 + 0.1 * math.sin(i)))
        peak = int(top * MIB) if i == seconds // 2 else int(charge * 1.05)
        phase = "load" if i < 5 else "forward"
        cells = [
            i * 4,
            f"{START + start + i:.3f}",
            phase,
            charge,
            peak,
            300 * MIB,
            12 * GIB - charge,
        ]
        cells.append("" if budget is None else budget)
        cells += [charge * 3, charge * 4, int(top * MIB * 3.5)] if gpu else []
        rows.append(",".join(map(str, cells)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.csv").write_text("\n".join([*rows, ""]))


def extraction(folder: Path, **fields: Any) -> Path:
    """run.json as raypipe.extract.run writes it."""
    cfg = ExtractConfig(
        data_dir=Path("/data/algonauts"), output_dir=Path("/out"), weights="random:0"
    )
    summary = {
        "stores": ["/out/dinov2_q_last/01/train.npy"], "rows": 2000, "rows_resumed": 40,
        "seconds": 64.1, "bad": [["01/train", "train-0007.png", "truncated <file>"]],
        "halved": ["01/train: batch 8", "01/train: batch 8"], "run_dir": "", "rows_per_s": 31.2,
    }  # fmt: skip
    weights = {
        "weights_sha256": "ab" * 32, "n_parameters": 86_580_480, "device_type": "cpu",
        "device_name": "2 cores",
    }  # fmt: skip
    memory = resolve(environ={"RAYPIPE_MAX_MEMORY_PER_PROCESS": "1GiB"}).record()
    record = run_record(cfg) | {
        "kind": "extract", "weights": weights, "torch_threads": 2, "memory": memory,
        "summary": summary, "command": ["raypipe", "extract", "--data-dir", "/data/my images"],
    }  # fmt: skip
    write_json(folder / "run.json", record | fields)
    return folder


class Text(HTMLParser):
    """Words and pictures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words, self.pictures, self.tags = "", [], set[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.words += " " + " ".join(data.split())


# ---- the extraction's page


def test_an_extraction_has_a_page_by_the_command(tmp_path: Path) -> None:
    run = extraction(tmp_path / "runs" / "extract-1")
    log(run / "memory", "worker-0-41", top=700)
    log(run / "memory", "driver-40", top=120)
    report(ReportConfig(run=run))
    page = Text(run / "report.html")
    for said in (
        "Feature extraction", "2,000", "31.2 images/s", "1 min 04 s; 40 more were there before",
        "700 MiB", "of a budget of 1.00 GiB, in worker-0-41", "random", "train-0007.png",
        "truncated <file>", "batch 8", "raypipe extract --data-dir '/data/my images'",
        "environment RAYPIPE_MAX_MEMORY_PER_PROCESS", "86,580,480", "dinov2_q, block -1",
    ):  # fmt: skip
        assert said in page.words, said
    assert "file" not in page.tags and len(page.pictures) == 1 and page.pictures[0]["alt"]
    assert page.words.count("01/train: batch 8") == 1


@pytest.mark.parametrize("kind", [{}, {"kind": None}])
def test_one_that_is_under_way_or_of_before_there_were_kinds(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    extraction(tmp_path, summary=None, memory=None, **kind)
    words = Text(build_report(tmp_path)).words
    assert "not finished" in words and "Feature extraction" in words
    assert "Memory" not in words.replace("RAYPIPE_MAX_MEMORY", "")


# ---- the section


def test_peaks_budget_and_headroom_are_in_the_table(tmp_path: Path) -> None:
    log(tmp_path / "memory", "a", top=512)
    log(tmp_path / "memory", "b", top=2048)
    log(tmp_path / "memory", "c", top=100, budget=None)
    section = memory_section(tmp_path, {})
    assert section is not None
    table = next(block for block in section.blocks if block.kind == "table")
    rows = {row[0]: row for row in table.rows}
    assert rows["a"][2:7] == ["forward", "512 MiB", "1.00 GiB", "50%", "300 MiB"]
    assert rows["b"][5] == "1.00 GiB over" and rows["c"][4:6] == ["none", "–"]
    assert all(len(row) == len(table.header) for row in table.rows)
    card = memory_card(tmp_path)
    assert card is not None and card.value == "2.00 GiB"


def test_nothing_logged_is_no_section(tmp_path: Path) -> None:
    assert memory_section(tmp_path, {"memory": resolve(environ={}).record()}) is None
    assert memory_card(tmp_path) is None
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "killed-at-once.csv").write_text(",".join(COLUMNS) + "\n")
    assert memory_section(tmp_path, {}) is None


def test_a_process_that_was_stopped_is_told_and_marked(tmp_path: Path) -> None:
    log(tmp_path / "memory", "worker-0-77", top=900)
    log(tmp_path / "memory", "worker-1-78", top=300)
    stopped = make_verdict(when=START + 60)
    stopped.write(tmp_path / "memory")
    section = memory_section(tmp_path, {})
    assert section is not None
    note, picture, table = section.blocks[:3]
    assert note.kind == "note" and note.text == stopped.message()
    assert picture.kind == "picture" and "cross" in picture.caption
    assert table.kind == "table"
    row = next(row for row in table.rows if row[0] == "worker-0-77")
    card = memory_card(tmp_path)
    assert card is not None and card.value == "1.10 GiB"
    assert row[1] == "stopped" and row[3] == "1.10 GiB" and "over" in row[5]


def make_verdict(**given: Any) -> Verdict:
    values = {
        "pid": 77, "start_ticks": 5, "host": "node", "label": "worker-0", "budget_bytes": GIB,
        "stop_bytes": 768 * MIB, "usage_bytes": 1126 * MIB, "anon_bytes": 1126 * MIB,
        "pinned_bytes": 0, "shm_bytes": 0, "file_bytes": 0, "batch": 16, "phase": "forward",
        "tried": ("batch halved",), "unseen_s": 0.005, "when": START,
    }  # fmt: skip
    return Verdict(**(values | given))


def test_a_run_of_many_deaths_tells_the_last(tmp_path: Path) -> None:
    for i in range(9):
        make_verdict(pid=100 + i, when=START + i).write(tmp_path / "memory")
    section = memory_section(tmp_path, {})
    assert section is not None
    told = [block.text for block in section.blocks if block.kind == "note"]
    assert len(told) == 6 and told[0].startswith("9 processes") and "process 108" in told[-1]


# ---- a fit's page, one subject and several


def test_a_fit_shows_memory_of_a_subject_and_of_what_all_share(tmp_path: Path) -> None:
    for subject in ("01", "02"):
        folder = tmp_path / f"subj{subject}"
        write_json(folder / "run.json", {"kind": "encode fit", "subject": subject})
    names = {"01": "subj01", "02": "subj02"}
    write_json(tmp_path / "run.json", {"kind": "encode fit", "subjects": names})
    log(tmp_path / "subj01" / "memory", "train", top=300)
    log(tmp_path / "memory", "driver", top=100)
    words = Text(build_report(tmp_path)).words
    assert "Subject 01 · Memory" in words and "Subject 02 · Memory" not in words
    assert "driver" in words


# ---- the figure


def test_the_budget_is_dashed_and_the_lines_are_the_peaks(tmp_path: Path) -> None:
    log(tmp_path, "a", top=800)
    log(tmp_path, "b", top=400, start=10)
    figure = memory_figure(
        read_histories(tmp_path), [Kill(time_s=START + 60, usage_bytes=1100 * MIB)]
    )
    (axes,) = figure.axes
    lines = {line.get_linestyle(): line for line in axes.lines}
    assert "--" in lines and list(lines["--"].get_ydata()) == [1.0, 1.0]
    tops = sorted(
        float(np.max(line.get_ydata())) for line in axes.lines if len(line.get_xdata()) > 2
    )
    assert tops == pytest.approx([400 / 1024, 800 / 1024])
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1100 / 1024
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "stopped"]


def test_a_budget_that_dwarfs_the_use_gets_a_panel_for_the_use(tmp_path: Path) -> None:
    log(tmp_path, "a", top=200, budget=8 * GIB)
    whole, enlarged = memory_figure(read_histories(tmp_path)).axes
    assert whole.get_ylim()[1] > 8 and enlarged.get_ylabel() == "charge, MiB"
    assert enlarged.get_ylim()[1] == pytest.approx(230)


def test_many_processes_gpus_and_one_row_are_drawn_alike_twice(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for i in range(12):
        log(tmp_path, f"worker-{i:02}", top=100 + 20 * i, seconds=1 + 5 * i, gpu=i > 9)
    histories = read_histories(tmp_path)
    figure = memory_figure(histories)
    assert len(figure.axes) == 3
    assert "5 more" in figure.legends[0].get_texts()[-1].get_text()
    assert len(figure.legends[0].get_texts()) == len(COLOURS) + 1
    assert png(memory_figure(histories), 60) == png(memory_figure(histories), 60)
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ValueError, match="at least one"):
        memory_figure([])


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    from raypipe.errors import StoreCorrupt

    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "x.csv").write_text("not\na log\n")
    with pytest.raises(StoreCorrupt, match=r"x\.csv"):
        memory_section(tmp_path, {})


def test_the_record_is_json(tmp_path: Path) -> None:
    extraction(tmp_path)
    saved = json.loads((tmp_path / "run.json").read_text())["memory"]
    assert saved["config"] == asdict(
        resolve(environ={"RAYPIPE_MAX_MEMORY_PER_PROCESS": "1GiB"}).config
    )
