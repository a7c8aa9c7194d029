"""Pictures and labels: which files, which pages of them, as which numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from segment_pictures import image, pages, save, save_ome_set
from skimage.segmentation import find_boundaries

from raypipe.errors import InputError, MissingInput, RaypipeError, UnknownName
from raypipe.read.source2d import open_image
from raypipe.segment import readers as readers_module
from raypipe.segment.channels import open_pixels
from raypipe.segment.labels import IGNORE, to_plane
from raypipe.segment.pictures import find_pictures, parse_range
from raypipe.segment.planted import PlantedNucleiConfig, make_planted_nuclei, nuclei
from raypipe.segment.readers import Readers
from raypipe.segment.split import divide


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """8-bit PNG, 16-bit and float TIFF, a stack of three pages; both ways to name a mask."""
    save(tmp_path / "train/images/a.png", image(np.uint8))
    save(tmp_path / "train/masks/a_mask.png", image(np.uint8))
    save(tmp_path / "train/images/b.tif", image(np.float32))
    save(tmp_path / "train/masks/b.png", image(np.uint8))
    save(tmp_path / "train/images/c.tif", image(np.uint16, (3, 20, 30)))
    save(tmp_path / "train/masks/c_mask.tif", image(np.uint16, (3, 20, 30)))
    save(tmp_path / "val/images/d.tiff", image())
    save(tmp_path / "val/masks/d.tif", image())
    return tmp_path


def test_a_folder_is_listed_page_by_page(folder: Path) -> None:
    found = find_pictures(folder)
    assert [(p.image.name, p.mask.name, p.frame, p.split) for p in found] == [
        ("a.png", "a_mask.png", 0, "train"),
        ("b.tif", "b.png", 0, "train"),
        *(("c.tif", "c_mask.tif", page, "train") for page in range(3)),
        ("d.tiff", "d.tif", 0, "val"),
    ]
    assert found[2].rows == (0, 20) and found[2].cols == (0, 30) and found[2].channels == 1


def test_a_table_gives_halves_of_one_picture(tmp_path: Path) -> None:
    save(tmp_path / "i.tif", image())
    save(tmp_path / "m.tif", image())
    lines = ("image,mask,split,cols,rows", "i.tif,m.tif,train,:15,", "i.tif,m.tif,val,15:20,")
    (tmp_path / "t.csv").write_text("\n".join([*lines, "i.tif,m.tif,test,20:,2:9"]))
    found = divide(find_pictures(tmp_path / "t.csv"), by="source", val_fraction=0.2, seed=0)
    assert [(p.split, p.rows, p.cols) for p in found] == [
        ("train", (0, 20), (0, 15)), ("val", (0, 20), (15, 20)), ("test", (2, 9), (20, 30)),
    ]  # fmt: skip


def test_a_file_of_an_ome_set_gives_its_own_pages(tmp_path: Path) -> None:
    """The whole set in each file would put every picture into training and into validation."""
    pixels = image(np.uint16, (5, 20, 30))
    own = {"one.ome.tif": pixels[:3], "two.ome.tif": pixels[3:]}
    for name, planes in own.items():
        save(tmp_path / "masks" / name, planes)
    (tmp_path / "images").mkdir()
    save_ome_set(tmp_path / "images", own)
    assert len(open_image(tmp_path / "images/one.ome.tif").read(4)) == 20, "it is a set"
    found = find_pictures(tmp_path)
    assert [(p.image.name, p.frame) for p in found] == [
        (name, frame) for name, planes in own.items() for frame in range(len(planes))
    ]
    readers = Readers()
    for picture, page in zip(found, pixels, strict=True):
        np.testing.assert_array_equal(readers.image(picture, (0, 20), (0, 30))[0], page)


@given(st.integers(1, 50), st.data())
def test_ranges_are_those_of_python(n: int, data: st.DataObject) -> None:
    lo = data.draw(st.integers(0, n - 1))
    hi = data.draw(st.integers(lo + 1, n))
    texts = {f"{lo}:{hi}"} | ({f":{hi}"} if lo == 0 else set()) | ({f"{lo}:"} if hi == n else set())
    for text in texts:
        assert range(*parse_range(text, n, "rows")) == range(n)[slice(lo, hi)]
    for bad in (f"{hi}:{lo}", f"0:{n + 1}", f"-1:{n}", "3", "a:b", "1:2:3"):
        with pytest.raises(InputError, match="rows"):
            parse_range(bad, n, "rows")


def test_masks_become_what_is_learned() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [0, 2, 1, 1, 1], [2, 2, 1, 1, 1], [9, 9, 1, 1, 1]])
    np.testing.assert_array_equal(to_plane(mask, "foreground", 2, None), (mask > 0).astype(int))
    ignored = to_plane(mask, "foreground", 2, 9)
    assert (ignored[3, :2] == IGNORE).all() and (ignored == IGNORE).sum() == 2
    boundary = to_plane(mask, "boundary", 2, None)
    np.testing.assert_array_equal(
        boundary == 2, find_boundaries(mask, mode="inner", connectivity=1)
    )
    np.testing.assert_array_equal(boundary > 0, mask > 0)
    np.testing.assert_array_equal(to_plane(mask, "classes", 10, None), mask)
    with pytest.raises(InputError, match=r"value 9, classes are 0 to 2.*--classes 10"):
        to_plane(mask, "classes", 3, None)


def test_many_files_are_understood_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def count(path: Path, axes: str | None) -> Any:
        opened.append(path)
        return open_pixels(path, axes)

    monkeypatch.setattr(readers_module, "open_pixels", count)
    for number in range(200):
        save(tmp_path / f"{number}.tif", image())
    readers = Readers()
    for number in [*range(200)] * 2:
        one = replace(pages(1, 1)[0], image=tmp_path / f"{number}.tif")
        readers.image(one, (0, 4), (0, 4))
    assert len(opened) == 200


def test_planted_nuclei_are_where_the_mask_says(tmp_path: Path) -> None:
    cfg = PlantedNucleiConfig(n_train=1, n_val=1, n_test=1, size=96, seed=5)
    counts, mask = nuclei(cfg, (0, 0))
    np.testing.assert_array_equal(np.unique(mask), np.arange(mask.max() + 1))
    assert counts[mask > 0].mean() > counts[mask == 0].mean() + 100
    folder = make_planted_nuclei(tmp_path, cfg)
    np.testing.assert_array_equal(tifffile.imread(folder / "train/images/nuclei_000.tif"), counts)
    assert not np.array_equal(nuclei(cfg, (1, 0))[1], mask)
    assert len(find_pictures(folder)) == 3


def spoil_missing_mask(folder: Path) -> None:
    (folder / "train/masks/a_mask.png").unlink()


def spoil_shape(folder: Path) -> None:
    save(folder / "train/masks/b.png", image(np.uint8, (20, 31)))


def spoil_pages(folder: Path) -> None:
    save(folder / "train/masks/c_mask.tif", image(np.uint16, (2, 20, 30)))


def spoil_double(folder: Path) -> None:
    save(folder / "train/masks/a.png", image(np.uint8))


def spoil_empty(folder: Path) -> None:
    for path in (folder / "val/images").iterdir():
        path.unlink()


def table(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "t.csv").write_text(text)
        return folder / "t.csv"

    return write


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (spoil_missing_mask, MissingInput, "no mask of a.png; add a_mask"),
        (spoil_shape, InputError, "20 x 30, its mask b.png 1 x 20 x 31"),
        (spoil_pages, InputError, "3 x 20 x 30, its mask c_mask.tif 2 x 20 x 30"),
        (spoil_double, InputError, "a.png has several masks"),
        (spoil_empty, MissingInput, "holds no .tif"),
        (table("image,mask,side\n"), UnknownName, "unknown column 'side'"),
        (table("image\nx.tif\n"), InputError, "needs image and mask"),
        (table("image,mask,split\nx.tif,y.tif,training\n"), UnknownName, "unknown split 'training'"),
        (table("image,mask\nx.tif,y.tif\n"), MissingInput, "x.tif is not there .*line 2"),
        (table("image,mask\n,y.tif\n"), InputError, "line 2: image ''"),
        (table("image,mask,rows\nval/images/d.tiff,val/masks/d.tif,5:99\n"), InputError, "'5:99'"),
        (table("image,mask\n"), MissingInput, "lists no image"),
        (lambda folder: folder / "nowhere", MissingInput, "neither a folder nor a table"),
    ],
)  # fmt: skip
def test_bad_inputs_say_what_and_what_next(
    folder: Path, spoil: Any, kind: type[RaypipeError], said: str
) -> None:
    data = spoil(folder) or folder
    with pytest.raises(kind, match=said) as raised:
        find_pictures(data)
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)
