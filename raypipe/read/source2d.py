"""What every 2-D input answers: frames of one size, of which parts are read; and `open_image`.

TIFF files and stacks of them are ``raypipe.read.tiff``, PNG, JPEG and the like ``picture``. Both
give handles that are cheap to pickle and open their files where they land. (What an extraction asks
of a folder of pictures is another protocol: ``folder.ImageSource``.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from raypipe.errors import InputError, MissingInput
from raypipe.read.picture import open_picture
from raypipe.read.tiff import open_tiff

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@runtime_checkable
class ImageSource(Protocol):
    """Images of one size and dtype behind one global frame index.

    shape : (n_frames, height, width) or (n_frames, height, width, channels)
    dtype : in this machine's byte order
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def read(self, frame: int, rows: slice = ..., cols: slice = ...) -> np.ndarray:
        """Pixels (rows, cols) or (rows, cols, channels); slices without a step."""
        ...


def open_image(path: Path | str, *, alone: bool = True) -> ImageSource:
    """The image or stack in the file ``path``; by its first bytes, whatever its name says.

    alone : as `raypipe.read.tiff.open_tiff`'s; False: no other file is looked into. Raises
    MissingInput, InputError.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError as error:
        raise MissingInput(f"image {path} is not there; give the path of an image file") from error
    except OSError as error:
        raise InputError(f"image {path} cannot be read ({error.strerror}); mend it") from error
    return open_tiff(path, alone=alone) if magic in _TIFF_MAGIC else open_picture(path)
