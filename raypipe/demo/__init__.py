"""``raypipe demo``: made data through a whole room, held against the truth that was planted in them.

``--job encoding`` (photographs in, brain encoder out) is ``encoding``, ``--job fmri`` (scans in, decoded
regions out) is ``fmri``, ``--job segment`` (pictures of nuclei in, their outlines out) is ``segment``. All
say what they found of what was planted, and fail when it is too little.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raypipe.demo.recovered import NotRecovered
from raypipe.runner import Runner

__all__ = ["DemoConfig", "NotRecovered", "demo"]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Make data, run a room on them from input to report, and check the result; about 2 minutes."""

    job: Literal["encoding", "fmri", "segment"] = "encoding"
    """Images to brain responses (encoding), classes decoded from scans (fmri), nuclei (segment)."""
    out: Path | None = None
    """Folder for data, run and report, by default demo-run, demo-fmri or demo-segment; a second call
    resumes in it."""
    n_train: int = 240
    """encoding: training images a subject."""
    n_test: int = 48
    """encoding: held-out images a subject."""
    epochs: int = 20
    """encoding: training epochs."""
    n_subjects: int = 6
    """fmri: subjects of 4 runs each."""
    n_permutations: int = 200
    """fmri: permuted labels for each p value."""
    seed: int = 0
    """Of the data, and of all that is random after."""

    @property
    def folder(self) -> Path:
        """``out``, absolute."""
        own = "demo-run" if self.job == "encoding" else f"demo-{self.job}"
        return (self.out or Path(own)).resolve()


def demo(cfg: DemoConfig, runner: Runner) -> None:
    """Run the chosen room; raises NotRecovered when the planted signal was not found again."""
    if cfg.job == "fmri":
        from raypipe.demo.fmri import demo_fmri

        demo_fmri(cfg, runner)
    elif cfg.job == "segment":
        from raypipe.demo.segment import demo_segment

        demo_segment(cfg, runner)
    else:
        from raypipe.demo.encoding import demo_encoding

        demo_encoding(cfg, runner)
