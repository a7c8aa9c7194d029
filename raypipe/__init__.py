"""raypipe: memory-bounded, Ray-distributed pipelines for scientific imaging.

Importing this package is cheap: neither torch nor ray is loaded until a part that needs it is.
"""

from __future__ import annotations

__version__ = "0.1.0"
