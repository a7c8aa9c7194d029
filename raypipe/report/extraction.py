"""The page of an extraction: OUTPUT/runs/extract-ID/run.json -> what came out, at what cost, of what.

Its run.json is written by ``raypipe.extract.run``; the section on memory is ``memory``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raypipe.report.blocks import Block, Card, Cards, Note, Page, Section, Table
from raypipe.report.memory import memory_card, memory_section
from raypipe.report.sections import how_it_was_made
from raypipe.units import format_seconds

Run = Mapping[str, Any]


def is_extraction(run: Run) -> bool:
    """Runs from before they had a kind are told by their configuration's class."""
    return run.get("kind") == "extract" or run.get("config_class") == "ExtractConfig"


def extraction_page(run_dir: Path, run: Run) -> Page:
    """The whole page. Raises StoreCorrupt when a memory log is damaged."""
    sections = [_result(run_dir, run)]
    sections += [s for s in (memory_section(run_dir, run), _bad_images(run)) if s is not None]
    sections.append(_setup(run))
    config = run.get("config") or {}
    started = str(run.get("started", ""))[:16].replace("T", " ")
    subtitle = " · ".join(filter(None, [str(config.get("backbone", "")), started]))
    footer = f"raypipe {run.get('raypipe', '')} · {run_dir.resolve()}"
    return Page("Feature extraction", subtitle, sections, footer)


def _result(run_dir: Path, run: Run) -> Section:
    blocks: list[Block] = [Cards(_cards(run_dir, run)), *_notes(run)]
    return Section("Result", blocks)


def _cards(run_dir: Path, run: Run) -> list[Card]:
    summary = run.get("summary")
    if summary is None:
        found = [Card("Images", "not finished", "the same command goes on from what is committed")]
    else:
        done, before = summary.get("rows", 0), summary.get("rows_resumed", 0)
        detail = f"computed in {format_seconds(summary.get('seconds', 0.0))}"
        if before:
            detail += f"; {before:,} more were there before"
        found = [Card("Images", f"{done:,}", detail)]
        if done:
            device = (run.get("weights") or {}).get("device_name", "")
            found.append(Card("Rate", f"{summary.get('rows_per_s', 0):.3g} images/s", device))
    memory = memory_card(run_dir)
    return [*found, memory] if memory else found


def _notes(run: Run) -> list[Note]:
    summary = run.get("summary") or {}
    found = [Note(str(text)) for text in run.get("notes", ())]
    weights = str((run.get("config") or {}).get("weights", ""))
    if weights.startswith("random"):
        found.append(
            Note(f"The weights are random ({weights}): these features test the pipeline only.")
        )
    if bad := summary.get("bad"):
        found.append(Note(f"{len(bad)} image(s) could not be read; their rows are marked invalid."))
    if halved := list(dict.fromkeys(summary.get("halved", ()))):
        found.append(Note(f"Memory was short, so batches were halved: {'; '.join(halved)}."))
    return found


def _bad_images(run: Run) -> Section | None:
    bad = (run.get("summary") or {}).get("bad")
    if not bad:
        return None
    rows = [[str(cell) for cell in row] for row in bad]
    caption = "Rows marked invalid"
    table = Table(["group", "image", "reason"], rows, caption, numeric_from=3, folded=len(bad) > 20)
    return Section("Images that could not be read", [table])


def _setup(run: Run) -> Section:
    config, weights = run.get("config") or {}, run.get("weights") or {}
    stores = (run.get("summary") or {}).get("stores") or ()
    layers = ", ".join(config.get("layer") or ()) or f"block {config.get('enc_layer', '?')}"
    digest = str(weights.get("weights_sha256", ""))[:16]
    pairs = [
        ("images", str(config.get("data_dir", "?"))),
        ("stores", "; ".join(map(str, stores)) or str(config.get("output_dir", "?"))),
        ("backbone", f"{config.get('backbone', '?')}, {layers}"),
        ("weights", f"{config.get('weights', '?')}" + (f", sha256 {digest}…" if digest else "")),
        ("parameters", f"{weights.get('n_parameters', 0):,}"),
        ("device", str(weights.get("device_name") or weights.get("device_type") or "?")),
        (
            "batch",
            f"{config.get('batch_size', '?')} images, {config.get('precision', '?')}, stored as"
            f" {config.get('store_dtype', '?')}",
        ),
    ]
    return how_it_was_made(run, pairs)
