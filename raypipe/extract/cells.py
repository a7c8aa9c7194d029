"""Images of one cell of the batch grid, read by threads and one cell ahead.

A bad image leaves its row zero, with the reason; what is computed from the cells is ``worker``.
At most two cells exist at a time.
"""

from __future__ import annotations

import platform
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raypipe.backbone import BackboneSpec
from raypipe.errors import BadImage, InputError
from raypipe.read import Undecodable, try_read_image
from raypipe.store import RowSource


@dataclass
class Cell:
    """One cell of the grid. pixels : (n, H, W, 3) uint8, of rows from ``lo`` on."""

    lo: int
    pixels: np.ndarray
    sources: list[RowSource]
    names: list[str]


class CellReader:
    """Reads cells as the backbone of ``spec`` wants their pixels.

    image_hw : size in pixels that every image must have when the backbone does not resize.
    Raises InputError for an image of another size or one that only this machine cannot open;
    BadImage for one that cannot be read, if ``fail_on_bad_image``.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        image_hw: tuple[int, int],
        *,
        threads: int,
        fail_on_bad_image: bool,
    ) -> None:
        self._spec, self._image_hw, self._fail_on_bad_image = spec, image_hw, fail_on_bad_image
        self._host_hw = spec.preprocess.host_size(*image_hw)
        self._decoders = ThreadPoolExecutor(threads, "decode")
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: tuple[tuple[str, int], Future[Cell]] | None = None

    def read_ahead(self, group: str, lo: int, paths: tuple[Path, ...]) -> None:
        """Begin on a cell that will probably be asked for next, without waiting."""
        self._ahead = ((group, lo), self._reader.submit(self._decode, lo, paths))

    def take(self, group: str, lo: int, paths: tuple[Path, ...]) -> Cell:
        """The cell that was read ahead, or, when another was, this one now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (group, lo):
            return ahead[1].result()
        if ahead is not None and not ahead[1].cancel():
            wait([ahead[1]])  # its memory comes first: two decoded cells at a time, not three
        return self._decode(lo, paths)

    def close(self) -> None:
        """End the threads."""
        for pool in (self._reader, self._decoders):
            pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, lo: int, paths: tuple[Path, ...]) -> Cell:
        pixels = np.zeros((len(paths), *self._host_hw, 3), np.uint8)
        jobs = [self._decoders.submit(self._decode_one, p, pixels[i]) for i, p in enumerate(paths)]
        return Cell(lo, pixels, [job.result() for job in jobs], [path.name for path in paths])

    def _decode_one(self, path: Path, out: np.ndarray) -> RowSource:
        """Decode and resize into ``out`` (H, W, 3); a bad image leaves it zero, with the reason."""
        image = try_read_image(path)
        if isinstance(image, Undecodable):
            if not image.digest:  # listed by the driver, and not even its bytes can be had here
                raise InputError(
                    f"{platform.node()} cannot open {path} ({image.reason}); put --data-dir on a disk "
                    "that every machine mounts, or mend or remove the file"
                )
            return self._bad(path, image)
        preprocess = self._spec.preprocess
        if preprocess.resize is None and image.pixels.shape[:2] != self._image_hw:
            got, want = image.pixels.shape[:2], self._image_hw
            raise InputError(
                f"{path.name} has {got[0]}x{got[1]} pixels, the first image {want[0]}x{want[1]}; "
                f"{self._spec.name} does not resize: give --image-size, or sort them apart"
            )
        try:
            out[...] = preprocess.host(image.pixels)
        except BadImage as error:  # too narrow to be resized
            narrow = Undecodable(
                reason=str(error), digest=image.digest, size_bytes=image.size_bytes
            )
            return self._bad(path, narrow)
        return RowSource(digest=image.digest, size_bytes=image.size_bytes, reason=None)

    def _bad(self, path: Path, image: Undecodable) -> RowSource:
        if self._fail_on_bad_image:
            raise BadImage(f"{path}: {image.reason}; mend or remove it, or --on-bad-image mark")
        return RowSource(digest=image.digest, size_bytes=image.size_bytes, reason=image.reason)
