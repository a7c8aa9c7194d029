"""``MemoryEfficientLoader``: decide by the memory options, say it, then read; and clean up in the end.

Decisions are ``decide``'s, reading is ``whole``'s and ``series``'.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raypipe.errors import InputError, RaypipeWarning
from raypipe.fmri.cache import default_cache
from raypipe.fmri.clean import CleanConfig
from raypipe.fmri.loader.decide import place, room_bytes, series_bytes
from raypipe.fmri.loader.mapped import MemoryMappedArray
from raypipe.fmri.loader.places import (
    BrainMasks,
    Data,
    Files,
    one_run,
    roi_voxels,
    subject_runs,
)
from raypipe.fmri.loader.scratch import Scratch
from raypipe.fmri.loader.series import Cache, RoiSeries, RunPart, extract, run_part
from raypipe.fmri.loader.whole import load_whole, place_whole
from raypipe.fmri.masks import Grid, Voxels
from raypipe.memory import MemoryConfig, MemoryMonitor, resolve
from raypipe.read.bids import BidsQuery
from raypipe.read.confounds import ConfoundsConfig
from raypipe.read.nifti import Scan, open_scan
from raypipe.read.runfiles import RunFiles
from raypipe.units import format_bytes, parse_bytes

Confounds = ArrayLike | Sequence[ArrayLike] | ConfoundsConfig | None


class MemoryEfficientLoader:
    """Reads a subject's scans within a memory budget; see the package for where things are.

    data      : fMRIPrep folder, table of runs, or {subject: file or files}; without it a subject is
        given as its file or files
    memory    : the memory options; by default those of this node and of RAYPIPE_… variables
    query     : which sessions, task, runs and space of the folder or table
    cache_dir : where unpacked scans are kept for the next time (cache=False: nowhere);
        by default $RAYPIPE_CACHE_DIR, else ~/.cache/raypipe/voxels
    temp_dir  : for mapped temporary files; by default the system's
    resample  : take the nearest voxels of masks on another grid, which otherwise are refused
    say       : what prints the decisions
    """

    def __init__(
        self,
        data: Data = None,
        memory: MemoryConfig | None = None,
        *,
        query: BidsQuery | None = None,
        raw_dir: Path | None = None,
        cache: bool = True,
        cache_dir: Path | None = None,
        cache_quota: str | int | None = None,
        temp_dir: Path | None = None,
        resample: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.data, self.query, self.raw_dir = data, query or BidsQuery(), raw_dir
        self.memory = memory or resolve().config
        self.resample = resample
        self._cache_dir = (Path(cache_dir) if cache_dir else default_cache()) if cache else None
        self._quota = None if cache_quota is None else parse_bytes(cache_quota)
        self._temp_dir, self._tell = temp_dir, say
        self._monitor = MemoryMonitor(self.memory)
        self._scratch: Scratch | None = None
        self._maps: list[MemoryMappedArray] = []
        self._said: list[str] = []
        self._closed = False
        self._brains = BrainMasks()

    def __enter__(self) -> MemoryEfficientLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def runs(self, subject: Files) -> tuple[RunFiles, ...]:
        """The runs of ``subject``, in order."""
        return subject_runs(self.data, subject, self.query, self.raw_dir)

    def load_fmri_memmap(self, subject: Files, *, run: str | int | None = None) -> Any:
        """A run of ``subject`` as a NIfTI image (x, y, z, t) that nilearn takes.

        Its array is in memory, or a read-only map: of the file itself where that is plain and without
        scaling, else of a temporary one that `cleanup` removes. Raises InputError,
        MemoryBudgetExceeded, NoSpace.
        """
        self._check_open()
        scan = open_scan(one_run(self.runs(subject), run).bold)
        placement = place_whole(scan, self.memory, self._room())
        self._say(placement.line(scan.describe()))
        image, mapped = load_whole(scan, placement, self._temporary().new)
        if mapped is not None:
            self._maps.append(mapped)
            mapped.array.flags.writeable = False
        return image

    def extract_roi_timeseries_memmap(
        self,
        subject: Files,
        roi_mask: Any,
        *,
        standardize: bool | Literal["zscore_sample", "psc"] = False,
        detrend: bool = False,
        confounds: Confounds = None,
        filter: Literal["butterworth", "cosine", False] | None = None,
        sample_mask: ArrayLike | Sequence[ArrayLike] | None = None,
        low_pass: float | None = None,
        high_pass: float | None = None,
        t_r: float | None = None,
        run: str | int | None = None,
    ) -> NDArray[np.float32]:
        """(volumes, voxels) float32, as nilearn's NiftiMasker gives it; several runs end to end.

        roi_mask : NIfTI file or image, boolean (x, y, z) array, or flat C-order voxel indices
        confounds : (T, k), one such a run, or a ConfoundsConfig of what to take from the runs' tables
        sample_mask : volumes to keep, as numbers or (T,) bool; of several runs, one each
        low_pass, high_pass : Hz; t_r : seconds, by default the header's
        Which voxels and volumes those are: `extract_roi`, of the same arguments.
        """
        config = CleanConfig(
            standardize=standardize,  # type: ignore[arg-type]  # it reads nilearn's True and False
            detrend=detrend,
            filter=filter or None,
            low_pass_hz=low_pass,
            high_pass_hz=high_pass,
            t_r_s=t_r,
        )
        found = self.extract_roi(
            subject, roi_mask, config, confounds=confounds, sample_mask=sample_mask, run=run
        )
        return found.values

    def extract_roi(
        self,
        subject: Files,
        roi_mask: Any,
        config: CleanConfig | None = None,
        *,
        confounds: Confounds = None,
        sample_mask: ArrayLike | Sequence[ArrayLike] | None = None,
        run: str | int | None = None,
    ) -> RoiSeries:
        """An ROI's series, cleaned by ``config``, with the voxels and volumes they are of.

        Raises InputError, MemoryBudgetExceeded, NoSpace.
        """
        self._check_open()
        runs = self.runs(subject)
        runs = runs if run is None else (one_run(runs, run),)
        scans = [open_scan(one.bold) for one in runs]
        grid = _one_grid(runs, scans)
        voxels = roi_voxels(roi_mask, grid, resample=self.resample)
        parts = self._parts(runs, scans, voxels, config or CleanConfig(), confounds, sample_mask)
        array, in_memory, mapped = series_bytes(
            voxels.size,
            [scan.n_volumes for scan in scans],
            max(int(scan.dtype.itemsize) for scan in scans),
        )
        what = f"{voxels.size} voxels of {len(scans)} run(s) of {runs[0].subject}"
        placement = place(
            what, array_bytes=array, in_memory_bytes=in_memory, mapped_bytes=mapped,
            config=self.memory, room=self._room(),
        )  # fmt: skip
        self._say(placement.line(what))
        cache = Cache(
            folder=self._cache_dir,
            spill=self._spill(),
            quota_bytes=self._quota,
            use_memmap=self.memory.use_memmap,
        )
        found = extract(parts, voxels, placement, cache, self._new_map, self._say)
        _warn_of_bad(found, what)
        return found

    def create_shared_memmap(
        self, data: ArrayLike, name: str = "shared", *, writable: bool = False
    ) -> MemoryMappedArray:
        """A copy of ``data`` in a temporary file that processes of this node share.

        Pickle it to them: they get a handle that maps the same file. Raises NoSpace.
        """
        self._check_open()
        values = np.asanyarray(data)
        self._say(f"{name}: {format_bytes(values.nbytes)} into a mapped temporary file")
        made = MemoryMappedArray.of(self._temporary().new(name), values, writable=writable)
        self._maps.append(made)
        return made

    def get_memory_usage_report(self) -> dict[str, Any]:
        """What this process holds and may hold, in bytes; its maps, files and decisions so far."""
        info = self._monitor.get_memory_info()
        return {
            "charge_bytes": info.charge.total_bytes,
            "file_bytes": info.charge.file_bytes,
            "budget_bytes": info.budget_bytes,
            "headroom_bytes": info.headroom_bytes,
            "available_bytes": info.available_bytes,
            "node_limit_bytes": info.limits.limit_bytes,
            "room_bytes": self._room(),
            "config": asdict(self.memory),
            "maps": [
                {"path": str(one.path), "shape": one.shape, "dtype": str(one.dtype),
                 "size_gb": one.size_gb}
                for one in self._maps
                if one.path.exists()
            ],
            "temp_dir": None if self._scratch is None else str(self._scratch.folder),
            "temp_bytes": 0 if self._scratch is None else self._scratch.used_bytes(),
            "cache_dir": None if self._cache_dir is None else str(self._cache_dir),
            "decisions": list(self._said),
        }  # fmt: skip

    def cleanup(self) -> None:
        """Remove the temporary files, unless cleanup_temp_files is off; again is no harm.

        Arrays and images that were given out stay readable: their pages go with the last of them.
        """
        self._closed = True
        scratch, self._scratch = self._scratch, None
        maps, self._maps = self._maps, []
        for one in maps:
            if self.memory.cleanup_temp_files:
                one.cleanup()
            else:
                one.close()
        if scratch is None:
            return
        if self.memory.cleanup_temp_files:
            scratch.remove()
        else:
            scratch.keep()
            self._say(f"temporary files are kept in {scratch.folder} (cleanup_temp_files is off)")

    def _parts(
        self,
        runs: Sequence[RunFiles],
        scans: Sequence[Scan],
        voxels: Voxels,
        config: CleanConfig,
        confounds: Confounds,
        sample_mask: Any,
    ) -> list[RunPart]:
        of_run = _each(confounds, len(runs), "confounds")
        kept = _each(sample_mask, len(runs), "sample_mask")
        return [
            run_part(
                one, scan, config, values, rows,
                self._brains.holding(one, scan, voxels, resample=self.resample),
            )
            for one, scan, values, rows in zip(runs, scans, of_run, kept, strict=True)
        ]  # fmt: skip

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("this loader is cleaned up; make another one")

    def _room(self) -> int:
        info = self._monitor.get_memory_info()
        return room_bytes(
            self.memory,
            limit_bytes=info.limits.limit_bytes,
            available_bytes=info.available_bytes,
            charge_bytes=info.charge.total_bytes,
        )

    def _temporary(self) -> Scratch:
        if self._scratch is None:
            self._scratch = Scratch(self._temp_dir)
        return self._scratch

    def _spill(self) -> Path:
        return self._temporary().folder / "voxels"

    def _new_map(self, name: str, shape: tuple[int, ...]) -> MemoryMappedArray:
        made = MemoryMappedArray.create(self._temporary().new(name), shape, np.float32)
        self._maps.append(made)
        return made

    def _say(self, text: str) -> None:
        self._said.append(text)
        self._tell(text)


def _one_grid(runs: Sequence[RunFiles], scans: Sequence[Scan]) -> Grid:
    """The grid of all ``scans``; raises InputError when one has another."""
    first = Grid.of(scans[0])
    for run, scan in zip(runs, scans, strict=True):
        if not Grid.of(scan).same_as(first):
            raise InputError(
                f"{run.name} lies on another grid than {runs[0].name}; read one run at a time by run="
            )
    return first


def _each(values: Any, n_runs: int, what: str) -> list[Any]:
    """One of ``values`` a run; a single run may be given its own alone."""
    if values is None or isinstance(values, ConfoundsConfig):
        return [values] * n_runs
    if n_runs == 1:
        listed = isinstance(values, (list, tuple)) and len(values) == 1 and np.ndim(values[0]) > 0
        return [values[0] if listed else values]
    if not isinstance(values, (list, tuple)) or len(values) != n_runs:
        raise InputError(
            f"{what} must be a list of {n_runs}, one a run; give that, or read one run"
        )
    return list(values)


def _warn_of_bad(found: RoiSeries, what: str) -> None:
    n_bad, n_still = int(found.not_finite.sum()), int(found.constant.sum())
    if n_bad or n_still:
        warnings.warn(
            f"of {what}, {n_bad} hold NaN or infinity and {n_still} are constant in some run; they say "
            "nothing: see extract_roi, or choose another mask",
            RaypipeWarning,
            stacklevel=4,
        )
