"""What tifffile only logs while it reads a file: kept for the message instead of printed.

It goes on after an error, with fewer pages than the file should have; here an error of its log is
an InputError, and its warnings become part of what a stack says of itself. So do errors in tags
that no pixel depends on: programs' own, dates and resolutions are often written wrong.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raypipe.errors import InputError
from raypipe.read.tiff.ifd import PIXEL_TAGS

# ``<tifffile.TiffFile 'name.tif'>`` at the front: the message names the file itself.
_OBJECT = re.compile(r"<tifffile\.[^>]*>\s*")
_TAG = re.compile(r"<tifffile\.TiffTag (\d+) @[^>]*>")


class _Kept(logging.Handler):
    """Records of one thread, whoever else reads TIFF files meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._thread = threading.get_ident()
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self._thread:
            return
        text = record.getMessage()
        tag = _TAG.search(text)
        harmless = tag is not None and int(tag[1]) not in PIXEL_TAGS
        kind = self.warnings if harmless or record.levelno < logging.ERROR else self.errors
        text = _OBJECT.sub("", _TAG.sub(r"tag \1:", text))
        kind.append(" ".join(text.split())[:200])


@contextmanager
def complaints(path: Path) -> Iterator[list[str]]:
    """The warnings of the block; an error among them is raised at its end as InputError."""
    handler, log = _Kept(), logging.getLogger("tifffile")
    log.addHandler(handler)
    try:
        yield handler.warnings
    finally:
        log.removeHandler(handler)
    if handler.errors:
        raise InputError(
            f"{path} cannot be trusted: {handler.errors[0]}; it is damaged or not whole: "
            "copy or convert it again"
        )
