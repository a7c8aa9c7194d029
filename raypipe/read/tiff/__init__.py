"""TIFF files -> pixels, by parts: one file or many behind one global frame index.

`open_tiff` gives a `TiffStack`, a picklable handle that reads crops of frames: plain values
straight from their place in the file, compressed or tiled pages by the strips and tiles that a crop
touches. `load_tiff_stack` gives the same as a `LazyStack`, sliced like the array that
``tifffile.imread`` would make of the whole file. Nothing here ever decodes a file as a whole.

How a file is understood is ``index`` (with tifffile's help) and ``chain`` (without); ``ifd`` reads
directories, ``opened`` what they point to; ``stack`` and ``lazy`` are what others use.
"""

from __future__ import annotations

from raypipe.read.tiff.join import load_tiff_stack, open_tiff
from raypipe.read.tiff.lazy import LazyStack
from raypipe.read.tiff.part import Part
from raypipe.read.tiff.stack import TiffStack

__all__ = ["LazyStack", "Part", "TiffStack", "load_tiff_stack", "open_tiff"]
