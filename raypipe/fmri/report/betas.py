"""The page's section on models: what each unit was fitted to, and what it came to."""

from __future__ import annotations

from raypipe.fmri.report.results import Record, Results
from raypipe.report.blocks import Section, Table


def betas_section(results: Results) -> Section:
    """A row a unit: a run of trials, or the conditions of a subject."""
    header = ["subject", "region", "of", "trials or contrasts", "voxels", "not finite", "constant"]
    header += ["volumes scrubbed", "seconds", "file"]
    rows = [_row(unit) for unit in results.units]
    caption = "Models; trial-wise betas are one volume a trial, contrasts one map each."
    return Section("Models", [Table(header, rows, caption, numeric_from=4, folded=len(rows) > 40)])


def _row(unit: Record) -> list[str]:
    asked = [f"{kind} {n}" for kind, n in unit.get("trials", {}).items()]
    asked = asked or [str(name) for name in unit.get("contrasts", ())]
    return [
        str(unit["subject"]), unit["roi"], unit["target"], ", ".join(asked),
        *(f"{unit[name]:,}" for name in ("n_voxels", "not_finite", "constant", "scrubbed")),
        f"{unit['seconds']:.1f}", next(iter(unit["files"]), "–"),
    ]  # fmt: skip
