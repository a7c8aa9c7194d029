"""The loader in the words people know: scans and ROI series of a subject, within a memory budget.

``MemoryEfficientLoader`` (``core``) says before it reads what goes into memory and what into a map
(``decide``, pure), finds a subject's runs and an ROI's voxels (``places``), and gives whole scans as
NIfTI images (``whole``) or cleaned ROI series (``series``) that nilearn and scikit-learn take.
``MemoryMappedArray`` (``mapped``) is an array in a file; ``scratch`` is the folder of such files and
how it goes away. Reading voxels is ``raypipe.store.voxels``, cleaning ``raypipe.fmri.clean``.
"""

from __future__ import annotations

from raypipe.fmri.loader.context import MemoryEfficientContext, create_memory_efficient_loader
from raypipe.fmri.loader.core import MemoryEfficientLoader
from raypipe.fmri.loader.mapped import MemoryMappedArray
from raypipe.fmri.loader.series import RoiSeries

__all__ = [
    "MemoryEfficientContext",
    "MemoryEfficientLoader",
    "MemoryMappedArray",
    "RoiSeries",
    "create_memory_efficient_loader",
]
