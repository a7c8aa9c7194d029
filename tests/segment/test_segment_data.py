"""Pictures, splits, labels and normalisation: which files, on which side, as which numbers."""

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
from PIL import Image
from segment_runs import config
from skimage.segmentation import find_boundaries

from raypipe.errors import ConfigError, InputError, MissingInput, RaypipeError, UnknownName
from raypipe.read.source2d import open_image
from raypipe.segment import readers as readers_module
from raypipe.segment.channels import open_pixels
from raypipe.segment.labels import IGNORE, to_plane
from raypipe.segment.normalise import Normalisation, measure
from raypipe.segment.ome_sets import sets_of
from raypipe.segment.pictures import Picture, find_pictures, parse_range
from raypipe.segment.planted import PlantedNucleiConfig, make_planted_nuclei, nuclei
from raypipe.segment.prepare import prepare
from raypipe.segment.readers import Readers
from raypipe.segment.split import check_apart, divide


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(pixels).save(path)
    else:
        tifffile.imwrite(path, pixels, photometric="minisblack")


def image(dtype: Any = np.uint16, shape: tuple[int, ...] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


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


def save_ome_set(folder: Path, own: dict[str, np.ndarray]) -> None:
    """OME-TIFF files, each with its own planes (n, h, w), which all name the whole set."""
    planes = [(name, at) for name, pixels in own.items() for at in range(len(pixels))]
    where = "".join(
        f'<TiffData FirstT="{t}" IFD="{at}" PlaneCount="1"><UUID FileName="{name}">urn:uuid:'
        f"{list(own).index(name)}bc0e5c2-7d30-4c58-9a1c-000000000000</UUID></TiffData>"
        for t, (name, at) in enumerate(planes)
    )
    for number, (name, pixels) in enumerate(own.items()):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas'
            f'/OME/2016-06" UUID="urn:uuid:{number}bc0e5c2-7d30-4c58-9a1c-000000000000">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" SizeX="30" SizeY="20" SizeZ="1" SizeC="1" '
            f'SizeT="{len(planes)}" DimensionOrder="XYCZT" Type="uint16">{where}</Pixels></Image></OME>'
        )
        with tifffile.TiffWriter(folder / name) as tif:
            for at, page in enumerate(pixels):
                tif.write(
                    page, contiguous=False, metadata=None, description=None if at else xml
                )  # fmt: skip


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


def test_an_ome_set_stands_on_one_side(tmp_path: Path) -> None:
    """Three files of a set beside two that only look alike, one of them OME too: three sources."""
    pixels = image(np.uint16, (5, 20, 30))
    own = {f"set_{n}.ome.tif": pixels[n : n + 1] for n in range(3)}
    for name in (*own, "other.ome.tif", "set_4.tif"):
        save(tmp_path / "masks" / name, pixels[:1] % 2)
        save(tmp_path / "images" / name, pixels[:1])
    save_ome_set(tmp_path / "images", own)
    alone = tmp_path / "alone"
    alone.mkdir()
    save_ome_set(alone, {"other.ome.tif": pixels[4:]})
    (alone / "other.ome.tif").rename(tmp_path / "images/other.ome.tif")
    images = [(tmp_path / "images" / name).resolve() for name in own]
    found = find_pictures(tmp_path)
    sets = sets_of(p.image for p in found)
    assert sets == dict.fromkeys(images, images[0])
    chosen = set()
    for seed in range(12):
        divided = divide(found, by="source", val_fraction=0.3, seed=seed, sets=sets)
        sides = {p.image: p.split for p in divided}
        assert len({sides[name] for name in images}) == 1
        chosen.add(sides[images[0]])
        assert sum(one == "val" for one in sides.values()) in (1, 3)
    assert chosen == {"train", "val"}
    named = [replace(p, split="val" if p.image == images[1] else "train") for p in found]
    said = r"set_0.ome.tif stands in train .* and set_1.ome.tif of its OME-TIFF set in val"
    with pytest.raises(InputError, match=said):
        divide(named, by="source", val_fraction=0.3, seed=0, sets=sets)
    divide(named, by="page", val_fraction=0.3, seed=0)


def test_a_fit_divides_by_sets(tmp_path: Path) -> None:
    pixels = image(np.uint16, (4, 20, 30))
    own = {f"{n}.ome.tif": pixels[n : n + 1] for n in range(4)}
    for name in own:
        save(tmp_path / "masks" / name, pixels[:1] % 2)
    (tmp_path / "images").mkdir()
    save_ome_set(tmp_path / "images", own)
    cfg = config(tmp_path, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"1 source cannot be divided.*--split-by page"):
        prepare(cfg)
    by_page = replace(cfg, inputs=replace(cfg.inputs, split_by="page"))
    assert {p.split for p in prepare(by_page).pictures} == {"train", "val"}


def pages(sources: int, each: int) -> list[Picture]:
    return [
        Picture(image=Path(f"/d/{s}.tif"), mask=Path(f"/d/{s}_mask.tif"), frame=page, rows=(0, 8),
                cols=(0, 8), split="", channels=1)
        for s in range(sources) for page in range(each)
    ]  # fmt: skip


@given(st.integers(2, 12), st.integers(1, 5), st.floats(0.05, 0.9), st.integers(0, 9))
def test_pages_of_a_source_stay_together(n: int, each: int, fraction: float, seed: int) -> None:
    asked = min(max(1, round(fraction * n)), n)
    if asked == n:
        with pytest.raises(ConfigError, match="cannot be divided"):
            divide(pages(n, each), by="source", val_fraction=fraction, seed=seed)
        return
    found = divide(pages(n, each), by="source", val_fraction=fraction, seed=seed)
    sides = {p.image: {q.split for q in found if q.image == p.image} for p in found}
    assert all(len(one) == 1 for one in sides.values())
    assert sum(one == {"val"} for one in sides.values()) == asked
    shuffled = divide(pages(n, each)[::-1], by="source", val_fraction=fraction, seed=seed)
    assert {(p.image, p.frame, p.split) for p in found} == {
        (p.image, p.frame, p.split) for p in shuffled
    }


def test_one_stack_is_divided_by_page_only_when_asked() -> None:
    with pytest.raises(ConfigError, match=r"1 source cannot be divided.*--split-by page"):
        divide(pages(1, 10), by="source", val_fraction=0.2, seed=0)
    found = divide(pages(1, 10), by="page", val_fraction=0.2, seed=0)
    assert sum(p.split == "val" for p in found) == 2
    named = [replace(p, split="val" if p.frame > 7 else "train") for p in pages(1, 10)]
    with pytest.raises(InputError, match=r"0\.tif stands in train .* and in val"):
        check_apart(named, "source")
    check_apart(named, "page")
    halves = [replace(p, cols=(0, 4) if p.split == "train" else (4, 8)) for p in named]
    check_apart(halves, "source")
    with pytest.raises(InputError, match="same pixels"):
        check_apart([halves[0], replace(halves[0], split="test", rows=(7, 8))], "page")


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


@pytest.mark.parametrize("kind", ["percentile", "minmax"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_normalisation_is_that_of_all_training_pixels(
    tmp_path: Path, kind: Any, dtype: Any
) -> None:
    rng = np.random.default_rng(1)
    parts, listed = [], []
    for number, cols in enumerate([(0, 40), (10, 25)]):
        pixels = (rng.gamma(2, 20, (31, 40)) * 2).astype(dtype)
        save(tmp_path / f"{number}.tif", pixels)
        parts.append(pixels[:, slice(*cols)].ravel())
        listed.append(
            replace(pages(1, 1)[0], image=tmp_path / f"{number}.tif", rows=(0, 31), cols=cols)
        )
    found = measure(listed, kind, low=1.0, high=99.0, readers=Readers())
    every = np.concatenate(parts).astype(np.float64)
    ends = (0, 100) if kind == "minmax" else (1, 99)
    want = [np.percentile(every, q, method="lower") for q in ends]
    step = np.ptp(every) / 2**20  # of a float's histogram
    np.testing.assert_allclose([found.low[0], found.high[0]], want, atol=1.01 * step, rtol=0)
    x = found.apply(np.array([[[want[0], want[1]]]], np.float64))
    np.testing.assert_allclose(x, [[[0, 1]]], atol=1e-4)


@pytest.mark.parametrize("hot", [1e5, 1e9, -1e9, 1e15])
def test_a_hot_pixel_does_not_move_the_percentiles(tmp_path: Path, hot: float) -> None:
    """What percentiles are for; a dead pixel as well, and the other channel has neither."""
    pixels = np.random.default_rng(1).gamma(2, 20, (90, 80, 2))
    pixels[30, 40, 0] = hot
    how = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "0.tif", pixels, **how)
    one = replace(pages(1, 1)[0], image=tmp_path / "0.tif", rows=(0, 90), cols=(0, 80), channels=2)
    found = measure([one], "percentile", low=1.0, high=99.0, readers=Readers())
    for channel in range(2):
        wanted = [np.percentile(pixels[..., channel], q, method="lower") for q in (1, 99)]
        got = [found.low[channel], found.high[channel]]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3 * (wanted[1] - wanted[0]))


def test_a_constant_image_has_no_range() -> None:
    with pytest.raises(ConfigError, match="low must be below high"):
        Normalisation(kind="minmax", low=(3.0,), high=(3.0,))


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
