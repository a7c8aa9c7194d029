"""Which images there are: folders or a table -> pages with their masks, regions and splits.

    DATA/{train,val,test}/images/NAME.tif     masks/NAME_mask.png or masks/NAME.tif
    DATA/images, DATA/masks                    no splits: divided by source image
    TABLE.csv: image,mask[,split][,frames][,rows][,cols]

Every page of a file is a picture, but for those that are channels of one (``channels``); a mask has a
page a picture. ``frames``, ``rows`` and ``cols`` are Python-like ranges ("0:256", "256:", ":"), pixels of
the image as it lies in the file. A region is where a picture begins and ends: nothing outside it is
read, so two halves of one image may stand on two sides. Paths are relative to the table. Who is
validated on, where nothing says so, is ``split``'s.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from raypipe.errors import InputError, MissingInput, UnknownName
from raypipe.read.source2d import ImageSource, open_image
from raypipe.segment.channels import check_agrees, open_pixels, said_otherwise, ways

SPLITS = ("train", "val", "test")
SUFFIXES = (".tif", ".tiff", ".png")
COLUMNS = ("image", "mask", "split", "frames", "rows", "cols")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One page (of one channel, or of several) and its mask, or a region of them: rows [lo, hi),
    cols [lo, hi) in pixels.

    split : "" where nothing says it. axes : of the image's file, where they were named
    """

    image: Path
    mask: Path
    frame: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    split: str
    channels: int
    axes: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the region."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def area(self) -> int:
        """Pixels."""
        return self.shape[0] * self.shape[1]

    @property
    def name(self) -> str:
        """For people: file, page, region."""
        return f"{self.image.name} page {self.frame} [{_words(self.rows)}, {_words(self.cols)}]"


@dataclass(frozen=True)
class Listed:
    """A line of the table, or a pair of files: what is asked for, before any file is opened."""

    image: Path
    mask: Path
    split: str = ""
    frames: str = ":"
    rows: str = ":"
    cols: str = ":"
    where: str = ""


def find_pictures(data: Path, axes: str | None = None) -> list[Picture]:
    """All pictures of ``data``, a folder or a table, in order of listing and page.

    axes : as `raypipe.segment.channels.open_pixels`'. Raises as `list_files` and `open_listed`.
    """
    return open_listed(list_files(data), axes)


def list_files(data: Path) -> list[Listed]:
    """What ``data`` asks for; no image is opened.

    Raises MissingInput, UnknownName (split, column), InputError (a mask that two files may be).
    """
    listed = list(_from_table(data) if data.is_file() else _from_folder(data))
    if not listed:
        raise MissingInput(f"{data} lists no image; give at least one image and its mask")
    return listed


def open_listed(listed: Iterable[Listed], axes: str | None = None) -> list[Picture]:
    """The pictures of ``listed``, in order of listing and page.

    Raises MissingInput, InputError (shapes or pages of image and mask that differ, a range outside its
    image), ConfigError (axes that do not fit, or move what a file calls channels).
    """
    notes: dict[str, list[str]] = {}
    found = [picture for one in listed for picture in _pages(one, axes, notes)]
    for note, names in notes.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{names[0]}{more}: {note}", file=sys.stderr, flush=True)
    return found


def _from_folder(data: Path) -> Iterator[Listed]:
    if not data.is_dir():
        raise MissingInput(f"{data} is neither a folder nor a table; give one of them as --data")
    splits = [name for name in SPLITS if (data / name).is_dir()]
    if not splits and not (data / "images").is_dir():
        raise MissingInput(
            f"{data} holds neither train/ nor images/; see raypipe segment fit --help"
        )
    if splits and "train" not in splits:
        raise MissingInput(f"{data} holds {', '.join(splits)} and no train/; add train/images")
    for split, folder in {s: data / s for s in splits}.items() or {"": data}.items():
        for image in _images(folder / "images"):
            # Without val/ the training images are divided, by their source.
            known = "" if split == "train" and "val" not in splits else split
            yield Listed(image, _mask_of(image, folder / "masks"), known, where=str(folder))


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MissingInput(f"{folder} is not there; put the images into it")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and _shown(p))
    if not found:
        raise MissingInput(f"{folder} holds no {', '.join(SUFFIXES)} file; put the images into it")
    return found


def _mask_of(image: Path, folder: Path) -> Path:
    """``<stem>_mask.*`` or ``<stem>.*`` in ``folder``. Raises MissingInput, InputError (several)."""
    stems = (f"{image.stem}_mask", image.stem)
    found = [
        path for stem in stems for suffix in SUFFIXES for path in folder.glob(f"{_escaped(stem)}.*")
        if path.stem == stem and path.suffix.lower() == suffix
    ]  # fmt: skip
    if not found:
        raise MissingInput(f"{folder} holds no mask of {image.name}; add {stems[0]}.png or .tif")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{image.name} has several masks in {folder} ({names}); keep one of them")
    return found[0]


def _escaped(stem: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)


def _shown(path: Path) -> bool:
    return not path.name.startswith(".")


def _from_table(path: Path) -> Iterator[Listed]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is no text table; give --data a .csv or .tsv, or a folder"
        ) from None
    lines = [line for line in text.splitlines() if line.strip()]
    rows = csv.DictReader(lines, delimiter="\t" if "\t" in text else ",")
    header = [name.strip() for name in rows.fieldnames or ()]
    rows.fieldnames = header
    for name in header:
        if name not in COLUMNS:
            raise UnknownName.of("column", name, COLUMNS, f"in {path}")
    for needed in COLUMNS[:2]:
        if needed not in header:
            raise InputError(f"{path} has columns {', '.join(header)}; it needs image and mask")
    for number, row in enumerate(rows, start=2):
        yield _line(path, number, {k: (v or "").strip() for k, v in row.items() if k is not None})


def _line(path: Path, number: int, row: Mapping[str, str]) -> Listed:
    where = f"{path} line {number}"
    if not row["image"] or not row["mask"]:
        raise InputError(f"{where}: image {row['image']!r}, mask {row['mask']!r}; give both paths")
    split = row.get("split", "")
    if split not in ("", *SPLITS):
        raise UnknownName.of("split", split, SPLITS, f"in {where}")
    ranges = {name: row.get(name) or ":" for name in ("frames", "rows", "cols")}
    folder = path.parent
    return Listed(folder / row["image"], folder / row["mask"], split, **ranges, where=where)


def _pages(one: Listed, axes: str | None, notes: dict[str, list[str]]) -> Iterator[Picture]:
    """The pictures of one line. notes : names of files by what is to be told of their axes; added to."""
    for path in (one.image, one.mask):
        if not path.is_file():
            where = f" ({one.where})" if one.where else ""
            raise MissingInput(f"{path} is not there{where}; mend the path")
    image, mask = open_pixels(one.image, axes), open_image(one.mask, alone=False)
    check_agrees(image)
    if image.shape[:3] != mask.shape[:3] or len(mask.shape) != 3:
        raise InputError(
            f"{one.image} has shape {_shape(image)}, its mask {one.mask.name} {_shape(mask)} (pages, height,"
            f" width, channels); give a mask of one channel and as many pages and pixels{_hint(image, mask)}"
        )
    if mask.dtype.kind not in "uib" and mask.dtype.kind != "f":
        raise InputError(f"{one.mask} holds {mask.dtype}; a mask is of whole numbers")
    if note := said_otherwise(image, "as asked"):
        notes.setdefault(note, []).append(one.image.name)
    n, height, width = image.shape[:3]
    frames = parse_range(one.frames, n, f"frames of {one.where or one.image}")
    rows = parse_range(one.rows, height, f"rows of {one.where or one.image}")
    cols = parse_range(one.cols, width, f"cols of {one.where or one.image}")
    channels = image.shape[3] if len(image.shape) > 3 else 1
    for frame in range(*frames):
        yield Picture(
            image=one.image.resolve(), mask=one.mask.resolve(), frame=frame, rows=rows, cols=cols,
            split=one.split, channels=channels, axes=axes,
        )  # fmt: skip


def _hint(image: ImageSource, mask: ImageSource) -> str:
    """What else may be meant where only the pages do not agree: pages that are, or are not, channels."""
    n, n_masks = image.shape[0], mask.shape[0]
    if len(mask.shape) != 3 or image.shape[1:3] != mask.shape[1:3]:
        return ""
    if n > n_masks and n % n_masks == 0 and len(image.shape) == 3:
        named = " or ".join(ways(image, n // n_masks))
        how = f"say --axes {named}" if named else "save it anew with axes that say so"
        return f"; where its pages are channels, {how}"
    if n_masks > n and len(image.shape) == 4 and n_masks == n * image.shape[3]:
        return "; where its pages are pictures and no channels, say --axes FYX"
    return ""


def parse_range(text: str, n: int, what: str) -> tuple[int, int]:
    """ "lo:hi" of [0, n), either left out -> (lo, hi). Raises InputError unless 0 <= lo < hi <= n."""
    lo, mark, hi = text.partition(":")
    try:
        first, last = int(lo or 0), int(hi or n)
    except ValueError:
        mark = ""
        first = last = 0
    if not mark or not 0 <= first < last <= n:
        raise InputError(
            f"{what}: {text!r} is no range of 0:{n}; write lo:hi, such as 0:{n // 2 or n}"
        )
    return first, last


def _shape(source: ImageSource) -> str:
    return " x ".join(str(n) for n in source.shape)


def _words(span: tuple[int, int]) -> str:
    return f"{span[0]}:{span[1]}"
