"""What ``raypipe fmri searchlight`` is asked to do; checked when made.

Inputs, labels, cleaning and decoding are those of ``fmri mvpa``; here stand the spheres and their blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import xxhash

from raypipe.errors import ConfigError
from raypipe.fmri.config import MvpaJobConfig
from raypipe.fmri.mvpa import MvpaConfig
from raypipe.fmri.searchlight.plan import SearchlightConfig
from raypipe.fmri.units import Target
from raypipe.units import parse_bytes

RESULT_FORMAT = 1  # a higher one computes finished maps and blocks anew


@dataclass(frozen=True, kw_only=True)
class SearchlightJobConfig(MvpaJobConfig):
    """Decode from a sphere around every voxel: maps of each subject, and of the group.

    Centres lie in the regions (--roi; the brain mask when none is named). Spheres hold voxels of the
    runs' common brain mask, or of the region where a run has no mask.
    """

    radius_mm: float = 8.0
    """Radius of each sphere; 6 to 12 is usual."""
    centres_a_block: int = 256
    """Most spheres a block: what a worker takes at a time, and what a crash can lose."""
    block_memory: str = "256MiB"
    """For a block's series and patterns; not of this machine, so that blocks are the same on all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sphere:
            raise ConfigError(
                f"sphere {self.sphere[0]} is a region of fmri mvpa; a searchlight's spheres are "
                "everywhere: give --roi NAME=mask.nii.gz for where their centres lie"
            )
        if not self.cache:
            raise ConfigError(
                "a searchlight reads each scan block by block, so it needs the cache; leave --no-cache "
                "out, or give --cache-dir on a disk with room"
            )
        if self.centres_a_block < 1:
            raise ConfigError(f"centres_a_block {self.centres_a_block} is below 1; 256 is usual")
        if self.weight_maps:
            raise ConfigError("weight_maps are of regions; leave them out, or use fmri mvpa")
        self.light_of(self.targets()[0])

    def decoding_of(self, target: Target) -> MvpaConfig:
        """As in ``fmri mvpa``, but with one score unless some are named: each takes time and is a map."""
        made = super().decoding_of(target)
        first = "accuracy" if target.column is None else "r"
        return made if made.scores else replace(made, scores=(first,))

    def light_of(self, target: Target) -> SearchlightConfig:
        """Spheres, decoding and blocks for ``target``."""
        return SearchlightConfig(
            radius_mm=self.radius_mm,
            decode=self.decoding_of(target),
            centres_a_block=self.centres_a_block,
            budget_bytes=self._budget_bytes(),
        )

    def _budget_bytes(self) -> int:
        found = parse_bytes(self.block_memory)
        if found == 0:
            raise ConfigError(f"block_memory {self.block_memory!r} is 0; 256MiB is usual")
        return found

    def map_key(self, unit_key: str) -> str:
        """Of a map: of all that ``unit_key`` stands for, and the spheres; not of how work is cut."""
        text = f"{unit_key} searchlight {RESULT_FORMAT} {self.radius_mm!r}"
        return str(xxhash.xxh3_128_hexdigest(text.encode()))
