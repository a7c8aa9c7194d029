"""Which pictures train and which validate: what shares a source, or a pixel, stands on one side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from segment_pictures import image, pages, save, save_ome_set
from segment_runs import config

from raypipe.errors import ConfigError, InputError
from raypipe.segment.ome_sets import sets_of
from raypipe.segment.pictures import find_pictures
from raypipe.segment.prepare import prepare
from raypipe.segment.split import check_apart, divide


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
