"""What the page of an fMRI run shows: results, decoding, maps, time, memory, data, how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raypipe.fmri.report.betas import betas_section
from raypipe.fmri.report.decoding import cards, decoding_section
from raypipe.fmri.report.lights import searchlight_cards, searchlight_section
from raypipe.fmri.report.results import Record, Results, read_results
from raypipe.report.blocks import Block, Card, Cards, Code, Note, Page, Picture, Section, Table
from raypipe.report.memory import memory_card, memory_section
from raypipe.report.sections import how_it_was_made
from raypipe.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from raypipe.fmri.report.brain import BrainMap

LIGHT, BETAS = "fmri searchlight", "fmri betas"
TITLES = {
    "fmri mvpa": "fMRI decoding",
    "fmri roi": "fMRI time series",
    LIGHT: "fMRI searchlight",
    BETAS: "fMRI models",
}
MOST_MAPS = 8  # drawn, about a second each


def fmri_page(run_dir: Path) -> Page:
    """The whole page. Raises MissingInput, StoreCorrupt."""
    results = read_results(run_dir)
    sections = [_result(results)]
    sections += _about(results)
    decoded = results.run.get("kind") not in (LIGHT, BETAS)
    sections += _present(
        _maps(results), _time(results), memory_section(run_dir, results.run),
        _units(results) if decoded else None, _series(results),
    )  # fmt: skip
    sections.append(_setup(results))
    started = str(results.run.get("started", ""))[:16].replace("T", " ")
    subjects = len({unit["subject"] for unit in results.units})
    named = () if results.run.get("kind") == BETAS else results.targets[:4]
    subtitle = " · ".join(filter(None, [f"{subjects} subjects", *named, started]))
    footer = f"raypipe {results.run.get('raypipe', '')} · {run_dir.resolve()}"
    return Page(TITLES.get(str(results.run.get("kind")), "fMRI"), subtitle, sections, footer)


def _about(results: Results) -> list[Section]:
    """What the run was for: a section a target, or its models."""
    if results.run.get("kind") == BETAS:
        return [betas_section(results)] if results.units else []
    about = searchlight_section if results.run.get("kind") == LIGHT else decoding_section
    return [about(results, target) for target in results.targets]


def _cards(results: Results) -> list[Card]:
    if results.run.get("kind") == BETAS:
        return []
    return searchlight_cards(results) if results.run.get("kind") == LIGHT else cards(results)


def _present(*sections: Section | None) -> Iterator[Section]:
    return (section for section in sections if section is not None)


def _result(results: Results) -> Section:
    found = _cards(results)
    summary = results.run.get("summary")
    if summary is None:
        found.append(Card("Units", "not finished", "the same command goes on from what is done"))
    else:
        detail = f"{summary['computed']} computed in {format_seconds(summary['seconds'])}"
        if summary["found"]:
            detail += f", {summary['found']} were there before"
        found.append(Card("Units done", f"{len(results.units):,}", detail))
    memory = memory_card(results.run_dir)
    blocks: list[Block] = [Cards([*found, memory] if memory else found), *_notes(results)]
    return Section("Result", blocks)


def _notes(results: Results) -> list[Block]:
    """Failures, and what the units warned of, each once."""
    notes: list[Block] = [Note(str(text)) for text in results.run.get("notes", ())]
    if results.failed:
        notes.append(
            Note(f"{len(results.failed)} unit(s) failed and are in no result; each is named below.")
        )
        rows = [[name, why] for name, why in results.failed.items()]
        notes.append(
            Table(["unit", "why"], rows, "Failed units", numeric_from=2, folded=len(rows) > 10)
        )
    said: dict[str, int] = {}
    for unit in results.units:
        for text in unit.get("warnings", ()):
            said[text] = said.get(text, 0) + 1
    for text, n in list(said.items())[:10]:
        notes.append(Note(f"{text} ({n} unit{'s' if n > 1 else ''})"))
    if len(said) > 10:
        notes.append(Code(f"{len(said) - 10} more warnings", "\n".join(list(said)[10:])))
    return notes


def _maps(results: Results) -> Section | None:
    from raypipe.fmri.report.brain import described, map_files, read_maps

    others = results.others_files()  # of other regions or targets: they lie beside this run's
    files = [path for path in map_files(results.run_dir) if path not in others]
    blocks: list[Block] = []
    left: list[list[str]] = []
    for path in files:
        if len(blocks) >= MOST_MAPS or not described(path).get("drawn", True):
            left.append([path.name])
            continue
        maps = read_maps(path)
        room = MOST_MAPS - len(blocks)
        blocks += [_drawn(path, one) for one in maps[:room]]
        if len(maps) > room:
            left.append([f"{path.name}: {len(maps) - room} of its {len(maps)} volumes"])
    if left:
        blocks.append(Table(["file"], left, "Maps that are not drawn", folded=True))
    return Section("Maps", blocks) if blocks else None


def _drawn(path: Path, one: BrainMap) -> Block:
    from raypipe.fmri.report.brain import draw_map
    from raypipe.report.plots import data_uri

    if one.empty:
        return Note(f"Map {path.name} has no value besides {one.what} 0.")
    caption = f"{path.name}: {one.what}; {one.extreme()}. Top: projections; bottom: slices."
    if not one.standard:
        caption += " The map is not said to be in MNI space: the glass outline is MNI's."
    return Picture(data_uri(draw_map(one)), f"Brain map: {one.title}", caption)


def _time(results: Results) -> Section | None:
    from raypipe.fmri.report.plots import seconds_by_subject
    from raypipe.report.plots import data_uri

    timed = [unit for unit in results.units if "seconds" in unit]
    if not timed:
        return None
    reading: dict[str, float] = {}
    decoding: dict[str, float] = {}
    for unit in timed:
        name = str(unit["subject"])
        reading[name] = reading.get(name, 0.0) + unit["seconds_reading"]
        decoding[name] = decoding.get(name, 0.0) + unit["seconds"]
    total = sum(reading.values()) + sum(decoding.values())
    caption = f"{format_seconds(total)} of workers' time in all; {_ways(timed)}."
    if len(reading) > 40:
        return Section("Time", [Note(caption)])
    picture = Picture(
        data_uri(seconds_by_subject(reading, decoding)), "Seconds by subject, stacked bars", caption
    )
    return Section("Time", [picture])


def _ways(units: Sequence[Record]) -> str:
    """From where scans were read, in words."""
    counts: dict[str, int] = {}
    for unit in units:
        for way in unit.get("ways") or [row["way"] for row in unit.get("series", ())]:
            counts[way] = counts.get(way, 0) + 1
    told = ", ".join(f"{way} {n}" for way, n in sorted(counts.items(), key=lambda kv: -kv[1]))
    return f"scans read for a unit: {told}" if told else "how scans were read is not recorded"


def _units(results: Results) -> Section | None:
    """What each decoding stood on."""
    units = [unit for unit in results.units if unit["target"]]
    if not units:
        return None
    header = ["subject", "ROI", "target", "score", "p", "voxels", "not finite", "constant"]
    header += ["outside mask", "samples", "read, s", "decoded, s", "peak memory"]
    rows = [_unit_row(results, unit) for unit in units]
    table = Table(header, rows, f"{len(rows)} units", numeric_from=3, folded=len(rows) > 12)
    return Section("Units", [table])


def _unit_row(results: Results, unit: Record) -> list[str]:
    score = results.first_score(unit["target"])
    value, p = unit["scores"].get(score), (unit.get("p") or {}).get(score)
    counts = [unit.get(name) for name in ("n_voxels", "not_finite", "constant", "outside_mask")]
    return [
        str(unit["subject"]), unit["roi"], unit["target"],
        "–" if value is None else f"{value:.3f}", "–" if p is None else f"{p:.3g}",
        *("–" if n is None else f"{n:,}" for n in counts), f"{unit.get('n_samples', 0):,}",
        f"{unit.get('seconds_reading', 0):.2f}", f"{unit.get('seconds', 0):.2f}",
        format_bytes(unit.get("peak_anon_bytes", 0)),
    ]  # fmt: skip


def _series(results: Results) -> Section | None:
    """Files of time series that ``fmri roi`` wrote."""
    rows = [row for unit in results.units for row in unit.get("series", ())]
    if not rows:
        return None
    header = ["file", "voxels", "volumes", "not finite", "constant", "scrubbed", "read"]
    names = ("file", "n_voxels", "n_volumes", "not_finite", "constant", "scrubbed", "way")
    body = [[str(row[name]) for name in names] for row in rows]
    return Section(
        "Time series", [Table(header, body, f"{len(body)} files", folded=len(body) > 40)]
    )


def _setup(results: Results) -> Section:
    config = results.run.get("config") or {}
    clean, decoding = config.get("clean") or {}, config.get("mvpa") or {}
    model = decoding.get("model") or {}
    used = results.units[0] if results.units else {}
    pairs = [
        ("inputs", str(config.get("bids_dir") or config.get("table") or "?")),
        ("cleaning", _cleaning(clean, config.get("confounds") or {})),
    ]
    if results.run.get("kind") in ("fmri mvpa", LIGHT):
        held = used.get("cv", decoding.get("cv", "?"))
        n = decoding.get("n_permutations", 0)
        pairs += [
            (
                "model",
                f"{model.get('estimator', '?')}, voxels scaled by {decoding.get('scale', '?')}",
            ),
            ("held out", str(held).replace("_", " ")),
            ("permutations", f"{n} within runs, seed {decoding.get('seed')}" if n else "none"),
            (
                "samples",
                f"each {config.get('each', '?')}, {config.get('delay_s')} s after its event",
            ),
        ]
    if results.run.get("kind") == LIGHT:
        pairs.append(("spheres", f"radius {config.get('radius_mm')} mm"))
    if results.run.get("kind") == BETAS:
        words = [str(config.get(name)) for name in ("method", "hrf", "drift", "noise")]
        pairs[1] = ("model", f"{', '.join(words)}; scaling {config.get('scaling')}")
        named = (config.get("confounds") or {}).get("strategy")
        pairs.append(("confounds", ", ".join(named or ()) or "none"))
    plan = results.run.get("plan") or ()
    made = how_it_was_made(results.run, pairs)
    extra = [Code("What was planned before anything was read", "\n".join(plan))] if plan else []
    return Section(made.title, [*made.blocks, *extra])


def _cleaning(clean: Record, confounds: Record) -> str:
    parts = ["linear trend removed"] if clean.get("detrend") else []
    if clean.get("filter"):
        band = [f"{name} {clean[f'{name}_hz']} Hz" for name in ("high_pass", "low_pass")
                if clean.get(f"{name}_hz")]  # fmt: skip
        parts.append(f"{clean['filter']} {', '.join(band)}")
    named = confounds.get("strategy") or confounds.get("columns")
    if named:
        parts.append(f"confounds {', '.join(named)}")
    if clean.get("standardize"):
        parts.append(f"standardised ({clean['standardize']})")
    return "; ".join(parts) or "none"
