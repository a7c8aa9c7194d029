"""The page of a predicted image, of its record (``predict_record``) alone: what came out, memory, of what.

Blocks and their look are ``raypipe.report``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raypipe.report.blocks import Block, Card, Cards, Note, Page, Section, Table
from raypipe.report.html import PAGE_FILE, render
from raypipe.report.memory import memory_card, memory_section
from raypipe.report.saved import read_run, write_bytes
from raypipe.report.sections import how_it_was_made
from raypipe.units import format_bytes, format_seconds

Run = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html; its path. Raises MissingInput, StoreCorrupt."""
    return write_bytes(folder / PAGE_FILE, render(predict_page(folder)).encode())


def predict_page(folder: Path) -> Page:
    """The page of OUTPUT.predict."""
    run = read_run(folder)
    blocks: list[Block] = [Cards(list(_cards(folder, run))), *_notes(run)]
    memory = memory_section(folder, run)
    sections = [Section("Result", blocks), *([memory] if memory else [])]
    sections.append(how_it_was_made(run, list(_setup(run))))
    started = str(run.get("started", ""))[:16].replace("T", " ")
    subtitle = f"{Path(run['output']['path']).name} · {started}"
    return Page(
        "Predicted image", subtitle, sections, f"raypipe {run['raypipe']} · {folder.resolve()}"
    )


def _cards(folder: Path, run: Run) -> Iterator[Card]:
    shape = " × ".join(map(str, run["output"]["shape"]))
    yield Card(
        run["output"]["what"].capitalize(),
        shape,
        f"{run['output']['dtype']}, in {run['output']['path']}",
    )
    result, tiles = run["result"], run["tiles"]["all"]
    if result is None:
        yield Card("Tiles", "not finished", "the same command goes on from what is recorded")
    else:
        detail = f"{result['kept']:,} of them by earlier runs"
        if result["seconds"] is not None:
            detail = f"{result['tiles']:,} in {format_seconds(result['seconds'])}, {detail}"
        yield Card("Tiles", f"{tiles:,}", detail)
    if memory := memory_card(folder):
        yield memory


def _notes(run: Run) -> Iterator[Block]:
    if said := run["input"].get("axes_note"):  # which earlier records do not have
        yield Note(f"Axes: {said}; where that is wrong, predict again with other --axes.")
    if run["tiles"]["field"]["how"] == "blended":
        yield Note("Windows were blended: the result is not that of the whole image.")
    if run["earlier"]:
        rows = [
            [one["started"], one["host"], f"raypipe {one['raypipe']}", str(one["kept"])]
            for one in run["earlier"]
        ]
        header = ["started", "host", "version", "tiles found"]
        yield Table(header, rows, "Earlier runs, which made some of the tiles", numeric_from=3)


def _setup(run: Run) -> Iterator[tuple[str, str]]:
    given, model, tiles = run["input"], run["model"], run["tiles"]
    size = " × ".join(map(str, given["space"]))
    for file in given["files"]:
        yield "input", f"{file['path']}, {file['bytes']:,} bytes ({format_bytes(file['bytes'])})"
    images = f"{given['frames']} of {size} pixels, {given['channels']} channel(s), {given['dtype']}"
    axes = given.get("axes")  # which earlier records do not say
    yield "images", f"{images}, axes taken to be {axes}" if axes else images
    yield "model", f"{model['run_dir']}, {model['checkpoint']}, epoch {_one_based(model['epoch'])}"
    for name, file in model["files"].items():
        yield f"digest of {name}", " ".join(f"{key} {value}" for key, value in file.items())
    yield "threshold", "none" if model["threshold"] is None else f"{model['threshold']:.4g}"
    field = tiles["field"]
    yield "field", f"radius {field['radius']}, align {field['align']} pixels, {field['how']}"
    yield (
        "tiles",
        f"{run['identity']['tile']} pixels, halo {run['identity']['halo']}, windows {tiles['window']}",
    )


def _one_based(epoch: int | None) -> str:
    return "not over" if epoch is None else str(epoch + 1)
