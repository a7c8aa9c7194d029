"""One contender of benchmarks/fmri.py, in a process of its own: reading regions.

``python fmri_child.py CONTENDER SPEC``; fmri_turn.py starts it. Imports are done before "imported", the
clock runs from there to "answered". Answers are saved afterwards, for the parent to compare.
What computes on series is fmri_compute.py.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fmri_compute import CLEANING, DECODING
from fmri_turn import Child

Spec = dict[str, Any]


def our_first(child: Child, spec: Spec) -> None:
    """The loader on a table; its cache is made behind the answer, unless ``cache`` is False."""
    import raypipe

    make = raypipe.MemoryEfficientLoader  # imported when it is named
    child.mark("imported")
    began = time.perf_counter()
    with make(spec["table"], cache=spec["cache"], cache_dir=Path(spec["cache_dir"])) as loader:
        values = loader.extract_roi_timeseries_memmap("01", spec["roi"])
        child.mark("answered", seconds=time.perf_counter() - began)
        np.save(spec["answer"], values)


def nilearn_first(child: Child, spec: Spec) -> None:
    """NiftiMasker on the file."""
    from nilearn.maskers import NiftiMasker

    child.mark("imported")
    began = time.perf_counter()
    values = NiftiMasker(spec["roi"], standardize=None).fit_transform(spec["scan"])
    child.mark("answered", seconds=time.perf_counter() - began)
    np.save(spec["answer"], values)


def our_second(child: Child, spec: Spec) -> None:
    """Regions of a scan that the cache has, one after another by the loader."""
    import raypipe

    regions = _open_masks(spec["rois"])
    make = raypipe.MemoryEfficientLoader  # imported when it is named
    child.mark("imported")
    with make(spec["table"], cache_dir=Path(spec["cache_dir"])) as loader:

        def read(mask: Any) -> Any:
            return loader.extract_roi_timeseries_memmap("01", mask)

        _timed_reads(child, spec, regions, read)


def store_second(child: Child, spec: Spec) -> None:
    """The same from the cache's reader, regions as voxel numbers."""
    from raypipe.fmri.masks import Grid, mask_voxels
    from raypipe.read.nifti import open_scan
    from raypipe.store.voxels import find

    scan = open_scan(spec["scan"])
    brain = mask_voxels(spec["mask"], Grid.of(scan))
    regions = [mask_voxels(path, Grid.of(scan)) for path in spec["rois"]]
    child.mark("imported")
    store = find(scan, brain, Path(spec["cache_dir"]))
    assert store is not None
    _timed_reads(child, spec, regions, lambda voxels: store.scaled(voxels).T)


def mapped_second(child: Child, spec: Spec) -> None:
    """A plain .nii mapped by nibabel, indexed with the mask."""
    import nibabel

    regions = [np.asarray(image.dataobj).astype(bool) for image in _open_masks(spec["rois"])]
    child.mark("imported")
    image = nibabel.load(spec["plain"])
    _timed_reads(child, spec, regions, lambda mask: np.asanyarray(image.dataobj)[mask].T)


def nilearn_second(child: Child, spec: Spec) -> None:
    """NiftiMasker with memory=: a region it has not seen, and that region once more."""
    from nilearn.maskers import NiftiMasker

    child.mark("imported")
    masker = NiftiMasker(spec["rois"][0], standardize=None, memory=spec["memory"], memory_level=5)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        values = masker.fit_transform(spec["scan"])
        seconds.append(time.perf_counter() - began)
    child.mark("answered", seconds=seconds[0], again=seconds[1])
    np.save(spec["answer"], values)


def _timed_reads(
    child: Child, spec: Spec, regions: list[Any], read: Callable[[Any], np.ndarray]
) -> None:
    """Warm pages and code with one round, then the median of the other rounds."""
    seconds = []
    for turn in range(1 + spec["rounds"]):
        for region in regions:
            began = time.perf_counter()
            read(region)
            if turn:
                seconds.append(time.perf_counter() - began)
    child.mark("answered", seconds=statistics.median(seconds), worst=max(seconds))
    np.save(spec["answer"], read(regions[0]))


def our_labels(child: Child, spec: Spec) -> None:
    """Means of all labels by the command, with its records and its report."""
    from raypipe.fmri.commands import roi
    from raypipe.fmri.config import RoiConfig
    from raypipe.runner import LocalRunner

    child.mark("imported")
    began = time.perf_counter()
    cfg = RoiConfig(
        table=Path(spec["table"]),
        atlas=spec["atlas"],
        reduce="mean",
        run_dir=Path(spec["run_dir"]),
        cache_dir=Path(spec["cache_dir"]),
    )
    roi(cfg, LocalRunner())
    child.mark("answered", seconds=time.perf_counter() - began)
    files = sorted((cfg.run_dir / "series").glob("*.npy"), key=lambda file: _label(file.stem))
    np.save(spec["answer"], np.concatenate([np.load(file) for file in files], axis=1))


def nilearn_labels(child: Child, spec: Spec) -> None:
    """NiftiLabelsMasker on the file."""
    from nilearn.maskers import NiftiLabelsMasker

    child.mark("imported")
    began = time.perf_counter()
    values = NiftiLabelsMasker(spec["atlas"], standardize=None).fit_transform(spec["scan"])
    child.mark("answered", seconds=time.perf_counter() - began)
    np.save(spec["answer"], values)


def our_whole(child: Child, spec: Spec) -> None:
    """The whole scan as an image, as the loader gives it."""
    import raypipe

    make = raypipe.MemoryEfficientLoader  # imported when it is named
    child.mark("imported")
    began = time.perf_counter()
    with make(spec["table"], raypipe.MemoryConfig(memmap_threshold_gb=0.1)) as loader:
        image = loader.load_fmri_memmap("01")
        child.mark("answered", seconds=time.perf_counter() - began)
        np.save(spec["answer"], np.asarray(image.dataobj[..., -1]))


def _label(stem: str) -> int:
    return int(stem.rpartition("-")[2])


def _open_masks(paths: list[str]) -> list[Any]:
    """Images whose values are in memory."""
    import nibabel

    images = [nibabel.load(path) for path in paths]
    return [nibabel.Nifti1Image(np.asarray(one.dataobj), one.affine) for one in images]


CONTENDERS: dict[str, Callable[[Child, Spec], None]] = {
    "our_first": our_first,
    "nilearn_first": nilearn_first,
    "our_second": our_second,
    "store_second": store_second,
    "mapped_second": mapped_second,
    "nilearn_second": nilearn_second,
    "our_labels": our_labels,
    "nilearn_labels": nilearn_labels,
    "our_whole": our_whole,
    **CLEANING,
    **DECODING,
}

if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](Child(), json.loads(sys.argv[2]))
