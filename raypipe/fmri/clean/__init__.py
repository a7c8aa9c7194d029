"""Time series -> cleaned time series, equal to ``nilearn.signal.clean``, a block of voxels at a time.

``config.py`` has the options; ``plan.py``, of ``scrub.py`` and ``nuisance.py``, decides what is done to
one run; ``kernels.py`` (compiled) or ``plain.py`` does it; ``series.py`` (``clean``) goes over runs and
blocks. Which voxels there are is
``raypipe.fmri.masks``.
"""

from __future__ import annotations

from raypipe.fmri.clean.config import CleanConfig
from raypipe.fmri.clean.series import Cleaned, clean

__all__ = ["CleanConfig", "Cleaned", "clean"]
