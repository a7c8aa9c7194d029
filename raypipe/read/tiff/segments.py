"""Which strips or tiles of a page a crop touches. Pure.

Strips and tiles are numbered as TIFF 6.0 does: by rows of tiles, then depth, then separate samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Strip or tile ``index``; its first row and column, and the crop's part of it.

    rows, cols : [lo, hi) of the page that crop and segment share
    whole      : the crop takes all of the segment that lies on the page
    """

    index: int
    y0: int
    x0: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    whole: bool


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A page (depth, height, width) cut into segments of (seg_depth, seg_height, seg_width).

    tiled : segments are whole beyond the page's edge; strips end with it
    """

    depth: int
    height: int
    width: int
    seg_depth: int
    seg_height: int
    seg_width: int
    tiled: bool

    @property
    def seg_items(self) -> int:
        """Pixels of a segment."""
        return self.seg_depth * self.seg_height * self.seg_width

    @property
    def across(self) -> int:
        """Segments side by side."""
        return -(-self.width // self.seg_width)

    @property
    def down(self) -> int:
        """Segments one below the other."""
        return -(-self.height // self.seg_height)

    @property
    def deep(self) -> int:
        """Segments one behind the other."""
        return -(-self.depth // self.seg_depth)

    def touched(
        self, plane: int, rows: tuple[int, int], cols: tuple[int, int]
    ) -> Iterator[Segment]:
        """Segments of ``plane`` (sample * depth + z) that [lo, hi) ``rows`` and ``cols`` touch."""
        if rows[0] >= rows[1] or cols[0] >= cols[1]:
            return
        sample, z = divmod(plane, self.depth)
        first = (sample * self.deep + z // self.seg_depth) * self.down * self.across
        for down in range(rows[0] // self.seg_height, -(-rows[1] // self.seg_height)):
            for across in range(cols[0] // self.seg_width, -(-cols[1] // self.seg_width)):
                yield self._segment(first + down * self.across + across, down, across, rows, cols)

    def _segment(
        self, index: int, down: int, across: int, rows: tuple[int, int], cols: tuple[int, int]
    ) -> Segment:
        y0, x0 = down * self.seg_height, across * self.seg_width
        y1, x1 = min(y0 + self.seg_height, self.height), min(x0 + self.seg_width, self.width)
        shared_rows = max(rows[0], y0), min(rows[1], y1)
        shared_cols = max(cols[0], x0), min(cols[1], x1)
        return Segment(
            index=index,
            y0=y0,
            x0=x0,
            rows=shared_rows,
            cols=shared_cols,
            whole=shared_rows == (y0, y1) and shared_cols == (x0, x1),
        )
