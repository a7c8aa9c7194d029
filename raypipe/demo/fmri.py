"""``raypipe demo --job fmri``: synthetic subjects in, decoded regions out, held against what was planted.

Six subjects or more of four runs with patterns planted in three ROIs and in none of three others; then
``raypipe fmri mvpa`` as a person would call it. A region counts as found when the group's test survives
the false discovery rate and most subjects' own permutation tests agree: planted regions must be found,
empty ones must not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypipe.demo.recovered import NotRecovered
from raypipe.fmri.commands import mvpa
from raypipe.fmri.config import MvpaJobConfig
from raypipe.fmri.ledger import Ledger
from raypipe.fmri.mvpa import MvpaConfig
from raypipe.fmri.planted import EMPTY, MOTION, PLANTED, PlantedFmriConfig, make_planted_subjects
from raypipe.read.confounds import ConfoundsConfig
from raypipe.report.html import PAGE_FILE
from raypipe.runner import Runner
from raypipe.units import format_seconds

if TYPE_CHECKING:
    from raypipe.demo import DemoConfig

TARGETS = ("all", "face,house")
LEVEL = 0.05
MOST = 2 / 3  # of the subjects: were a region empty, 4 of 6 would come to p < 0.05 once in 10,000


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One region and target. q : of the group; subjects, below : how many, and with p < LEVEL."""

    roi: str
    target: str
    planted: bool
    score: float
    chance: float
    q: float
    subjects: int
    below: int

    @property
    def found(self) -> bool:
        """Whether group and subjects agree that there is something."""
        return self.q < LEVEL and self.below >= MOST * self.subjects

    @property
    def right(self) -> bool:
        """Whether that is the truth."""
        return self.found == self.planted

    def line(self) -> str:
        """For people."""
        truth = "planted" if self.planted else "empty"
        return (
            f"{self.roi:<10} {self.target:<11} {truth:<8} accuracy {self.score:.3f} (chance "
            f"{self.chance:.2f}), group q {self.q:.2g}, {self.below} of {self.subjects} subjects p < "
            f"{LEVEL}: {'found' if self.found else 'not found'}{'' if self.right else '  WRONG'}"
        )


def demo_fmri(cfg: DemoConfig, runner: Runner) -> None:
    """Run the whole; raises NotRecovered when a planted region is missed or an empty one found."""
    started = time.monotonic()
    planted = PlantedFmriConfig(subjects=cfg.n_subjects, seed=cfg.seed)
    data = make_planted_subjects(cfg.folder / "data", planted)
    print(
        f"demo: {planted.subjects} subjects of {planted.runs} runs in {data}; patterns planted in "
        f"{', '.join(PLANTED)}; nothing in {', '.join(EMPTY)}",
        flush=True,
    )
    job = mvpa_config(cfg.folder, cfg)
    summary = mvpa(job, runner)
    page = job.run_dir / PAGE_FILE
    found = verdicts(summary.group, Ledger(job.run_dir).all())
    print("\n" + "\n".join(one.line() for one in found))
    print(f"report     {page}")
    wrong = [one for one in found if not one.right]
    right = f"{len(found) - len(wrong)} of {len(found)} as planted"
    print(f"recovered  {right}, in {format_seconds(time.monotonic() - started)}")
    if wrong or not found:
        told = "; ".join(
            f"{one.roi} {one.target} is {'empty' if one.found else 'planted'} and was "
            f"{'found' if one.found else 'not found'}"
            for one in wrong
        )
        raise NotRecovered(
            f"{told or 'nothing was decoded'}; look at {page}, and run in an empty --out"
        )


def mvpa_config(out: Path, cfg: DemoConfig) -> MvpaJobConfig:
    """The demo's decoding, as ``raypipe fmri mvpa`` would be asked for it."""
    return MvpaJobConfig(
        run_dir=out / "run",
        bids_dir=out / "data",
        atlas=str(out / "data" / "atlas.nii.gz"),
        atlas_names=out / "data" / "atlas.tsv",
        confounds=ConfoundsConfig(columns=MOTION),
        cache_dir=out / "cache",
        target=TARGETS,
        delay_s=4.0,
        each="trial",
        mvpa=MvpaConfig(n_permutations=cfg.n_permutations, seed=cfg.seed),
    )


def verdicts(
    group: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> list[Verdict]:
    """What group.json's rows and the units' records say of each region, by accuracy."""
    found = []
    for row in group:
        if row["score"] != "accuracy":
            continue
        p = [
            record["p"]["accuracy"]
            for record in records
            if (record["roi"], record["target"]) == (row["roi"], row["target"])
        ]
        found.append(
            Verdict(
                roi=row["roi"],
                target=row["target"],
                planted=row["roi"] in PLANTED,
                score=row["mean"],
                chance=row["chance"],
                q=row["q"],
                subjects=len(p),
                below=sum(one < LEVEL for one in p),
            )
        )
    return found
