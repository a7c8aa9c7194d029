"""A run folder -> report.html: one file, no network, made from saved files alone.

What is shown is decided in ``sections``; the look is ``templates/report.html.j2``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypipe.errors import InputError
from raypipe.report import sections
from raypipe.report.blocks import Block, Cards, Page, Section
from raypipe.report.extraction import extraction_page, is_extraction
from raypipe.report.memory import memory_section
from raypipe.report.saved import read_run, subject_folders, write_bytes

if TYPE_CHECKING:
    import jinja2

PAGE_FILE = "report.html"


def build_report(run_dir: Path) -> Path:
    """Write RUN/report.html of an extraction or a fit; returns its path.

    Raises MissingInput when ``run_dir`` is no run folder, StoreCorrupt when a file is damaged,
    InputError for a run whose room makes its own page.
    """
    return write_bytes(run_dir / PAGE_FILE, render(run_page(run_dir)).encode())


def run_page(run_dir: Path) -> Page:
    """The page of a run folder."""
    parent = read_run(run_dir)
    if is_extraction(parent):
        return extraction_page(run_dir, parent)
    if str(parent.get("kind", "")).startswith(("fmri ", "segment ")):
        raise InputError(
            f"{run_dir} is a run of {parent['kind']}, whose room makes its page; give raypipe report, or "
            "call raypipe.fmri.report.write_report or raypipe.segment.page.write_report"
        )
    folders = subject_folders(run_dir)
    runs = {subj: read_run(folder) for subj, folder in folders.items() if _is_run(folder)}
    several = len(folders) > 1
    found = [_overview(folders, runs)]
    for subj, run in runs.items():
        found += _of_subject(folders[subj], run, f"Subject {subj} · " if several else "")
    if several and (memory := memory_section(run_dir, parent)):  # of the run that all share
        found.append(memory)
    names = ", ".join(f"subject {subj}" for subj in folders if subj)
    feature = ((parent.get("config") or {}).get("feature")) or ""
    started = str(parent.get("started", ""))[:16].replace("T", " ")
    subtitle = " · ".join(filter(None, [names, feature, started]))
    title = {"encode fit": "Brain encoding"}.get(str(parent.get("kind")), "Run")
    return Page(
        title, subtitle, found, f"raypipe {parent.get('raypipe', '')} · {run_dir.resolve()}"
    )


def _is_run(folder: Path) -> bool:
    """A subject that was not reached yet has no run.json."""
    return (folder / "run.json").is_file()


def _overview(folders: dict[str, Path], runs: dict[str, dict[str, Any]]) -> Section:
    blocks: list[Block] = [Cards(sections.cards(folders[subj], run)) for subj, run in runs.items()]
    said = {note.text: note for run in runs.values() for note in sections.notes(run)}
    return Section("Result", [*blocks, *said.values()])


def _of_subject(folder: Path, run: dict[str, Any], prefix: str) -> Iterator[Section]:
    for make in sections.SECTIONS:
        section = make(folder, run)
        if section is not None:
            yield Section(prefix + section.title, section.blocks)


def render(page: Page) -> str:
    """The page as HTML; everything that came from outside is escaped."""
    return _template().render(page=page)


@cache
def _template() -> jinja2.Template:
    import jinja2

    folder = resources.files("raypipe.report") / "templates"
    source = (folder / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)
