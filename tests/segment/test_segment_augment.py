"""Augmentation and crops: a function of (seed, sample, epoch), image and mask moved as one."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.segment import augment
from raypipe.segment.augment import AugmentConfig, Draw
from raypipe.segment.crops import CropSource, Labelling, grid_corners, read_window
from raypipe.segment.labels import IGNORE
from raypipe.segment.normalise import Normalisation
from raypipe.segment.pictures import Picture
from raypipe.segment.readers import Readers
from raypipe.stream import Gatherer

CROP = 32
STILL = AugmentConfig(gain=0, offset=0, noise=0, warp_probability=1)
AS_IS = Normalisation(kind="none", low=(0.0,), high=(1.0,))


def smooth(side: int) -> np.ndarray:
    """(side, side) float32: waves of 20 pixels and more, so that a shift by one pixel is small."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    return np.sin(y / 5) + np.cos(x / 7)


FIELD = smooth(300)


@given(seed=st.integers(0, 999), sample=st.integers(0, 10**6), epoch=st.integers(0, 10**4))
def test_a_mask_follows_its_image(seed: int, sample: int, epoch: int) -> None:
    d = augment.draw(STILL, CROP, seed, sample, epoch)
    rows, cols = augment.window(d, ((100, 200), (100, 200)), CROP)
    image = FIELD[rows[0] : rows[1], cols[0] : cols[1]][None]
    plane = np.round(image[0] * 100).astype(np.int16) + 1000
    crop, labels = augment.apply(d, image, plane, CROP)
    assert crop.shape == (1, CROP, CROP) and labels.shape == (CROP, CROP)
    assert (labels != IGNORE).all(), "the window is smaller than what the crop reaches"
    # nearest and linear are within half a pixel of each other; the field's slope is below 0.35 a pixel
    assert np.abs((labels - 1000) / 100 - crop[0]).max() < 0.25


@given(st.integers(0, 3), st.booleans(), st.booleans())
def test_flips_and_turns_move_pixels_exactly(turns: int, down: bool, right: bool) -> None:
    image = np.arange(2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8)
    plane = np.arange(64, dtype=np.int16).reshape(8, 8)
    d = Draw(at=(0, 0), flip=(down, right), turns=turns)
    crop, labels = augment.apply(d, image, plane, 8)
    want = [[int(plane[r, c]) for c in range(8)] for r in range(8)]
    want = want[::-1] if down else want
    want = [row[::-1] for row in want] if right else want
    for _ in range(turns):  # one turn against the clock
        want = [[want[r][7 - c] for r in range(8)] for c in range(8)]
    np.testing.assert_array_equal(labels, want)
    np.testing.assert_allclose(crop[0], labels, atol=1e-5)
    np.testing.assert_allclose(crop[1], labels + 64, atol=1e-4)


@given(st.integers(0, 99), st.integers(0, 10**9), st.integers(0, 2**31 - 1))
def test_a_draw_is_a_function_of_its_key(seed: int, sample: int, epoch: int) -> None:
    cfg = AugmentConfig(warp_probability=0.5)
    one, other = (augment.draw(cfg, CROP, seed, sample, epoch) for _ in range(2))
    np.testing.assert_equal(vars(one), vars(other))
    changed = augment.draw(cfg, CROP, seed, sample, epoch + 1)
    assert changed.at != one.at and changed.noise_key != one.noise_key
    assert abs(one.gain - 1) <= cfg.gain and abs(one.offset) <= cfg.offset
    assert 0 <= one.noise <= cfg.noise and abs(one.angle_deg) <= cfg.rotate_deg


def test_a_known_rotation() -> None:
    """By 90 degrees the free rotation must come to what the quarter turn gives."""
    image, plane = smooth(80)[None], (smooth(80) > 0).astype(np.int16)
    freely = Draw(at=(0, 0), angle_deg=90.0)
    exactly = Draw(at=(0, 0), turns=1)
    margin = augment.margin_px(freely, CROP)
    middle = slice(24 - margin, 24 + CROP + margin)
    got = augment.apply(freely, image[:, middle, middle], plane[middle, middle], CROP)
    still = slice(24, 24 + CROP)
    want = augment.apply(exactly, image[:, still, still], plane[still, still], CROP)
    turned = (
        want
        if np.allclose(got[0], want[0], atol=1e-3)
        else tuple(np.rot90(w, 2, axes) for w, axes in zip(want, ((1, 2), (0, 1)), strict=True))
    )  # to one side or the other: augmentation draws both signs
    np.testing.assert_allclose(got[0], turned[0], atol=1e-3)
    assert (got[1] == turned[1]).mean() > 0.99


def source(tmp_path: Path, *, val: bool = False, size: int = 70, crop: int = CROP) -> CropSource:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(1, 999, (size, size)).astype(np.uint16), np.arange(size * size)
    tifffile.imwrite(tmp_path / "i.tif", image)
    tifffile.imwrite(tmp_path / "m.tif", (mask.reshape(size, size) % 7).astype(np.uint8))
    picture = Picture(
        image=tmp_path / "i.tif", mask=tmp_path / "m.tif", frame=0, rows=(3, size - 4),
        cols=(5, size), split="val" if val else "train", channels=1,
    )  # fmt: skip
    corner = grid_corners(picture, crop) if val else [(-1, -1)] * 6
    return CropSource(
        pictures=(picture,), picture_of=np.zeros(len(corner), np.int32), seed=4,
        corner=np.array(corner, np.int64), crop=crop, normalisation=AS_IS,
        labelling=Labelling(target="classes", classes=7), augment=AugmentConfig(),
    )  # fmt: skip


def test_rows_do_not_depend_on_who_makes_them(tmp_path: Path) -> None:
    crops = source(tmp_path)
    rows = np.array([0, 3, 5, 6 * 7 + 3, 6 * 10**6])
    alone = crops.decode_rows(rows)
    travelled = pickle.loads(pickle.dumps(crops))
    reader = travelled.open()
    np.testing.assert_array_equal(reader.start(rows[::-1].copy())()[::-1], alone)
    with Gatherer({"crop": crops}, 3) as gatherer:
        batches = [b["crop"].numpy().copy() for b in gatherer.batches([rows[:2], rows[2:]])]
    np.testing.assert_array_equal(np.concatenate(batches), alone)
    assert not np.array_equal(alone[1], alone[3]), "another epoch is another crop"
    with pytest.raises(ConfigError, match="6 samples"):
        crops.check(np.array([-1]))


@pytest.mark.parametrize("target", ["foreground", "boundary", "classes"])
def test_labels_do_not_depend_on_where_a_crop_is_cut(tmp_path: Path, target: Any) -> None:
    mask = np.repeat(np.repeat(np.random.default_rng(3).integers(0, 4, (9, 9)), 8, 0), 8, 1)
    for name in ("i.tif", "m.tif"):
        tifffile.imwrite(tmp_path / name, mask.astype(np.uint8))
    picture = Picture(image=tmp_path / "i.tif", mask=tmp_path / "m.tif", frame=0, rows=(4, 70),
                      cols=(0, 60), split="val", channels=1)  # fmt: skip
    labelling = Labelling(target=target, classes=4)
    whole = labelling.plane(mask[4:70, :60])  # nothing beyond the region is known
    readers = Readers()
    for top in range(4, 70 - CROP):
        rows, cols = (top, top + CROP), (top - 4, top - 4 + CROP)
        cols = (min(cols[0], 60 - CROP), min(cols[1], 60))
        got = read_window(readers, picture, rows, cols, AS_IS, labelling)[1]
        np.testing.assert_array_equal(got, whole[top - 4 : top - 4 + CROP, slice(*cols)])


@pytest.mark.parametrize("crop", [16, 32, 96])
def test_validation_counts_every_pixel_of_the_region_once(tmp_path: Path, crop: int) -> None:
    crops = source(tmp_path, val=True, crop=crop)
    rows = crops.decode_rows(np.arange(crops.samples))
    labels = rows[:, 1][rows[:, 1] != IGNORE]
    mask = tifffile.imread(tmp_path / "m.tif")[3:66, 5:70]
    np.testing.assert_array_equal(np.bincount(labels.astype(int)), np.bincount(mask.ravel()))
    np.testing.assert_array_equal(rows, crops.decode_rows(np.arange(crops.samples) + crops.samples))


def test_nothing_beyond_a_region_is_read(tmp_path: Path) -> None:
    crops = source(tmp_path)
    before = crops.decode_rows(np.arange(60))
    image = tifffile.imread(tmp_path / "i.tif")
    image[:3], image[66:], image[:, :5] = 60000, 60000, 60000
    assert before.max() < 2000
    after = source(tmp_path)
    tifffile.imwrite(tmp_path / "i.tif", image)
    fresh = pickle.loads(pickle.dumps(after))
    from raypipe.segment import crops as module

    module._opened = None  # the file was written again under its handle
    np.testing.assert_array_equal(fresh.decode_rows(np.arange(60)), before)


@pytest.mark.parametrize(
    ("field", "value"), [("gain", 1.0), ("noise", -1), ("rotate_deg", 181), ("zoom", float("nan"))]
)
def test_options_check_themselves(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        AugmentConfig(**{field: value})


STRAIGHT = Draw(at=(0, 0))


def cropped(d: Draw, image: np.ndarray, crop: int = CROP) -> tuple[np.ndarray, np.ndarray]:
    """The crop in the middle of ``image`` (side, side), of d's own window, and that of its numbers."""
    margin, start = augment.margin_px(d, crop), (len(image) - crop) // 2
    middle = slice(start - margin, start + crop + margin)
    plane = np.arange(image.size, dtype=np.int32).reshape(image.shape)
    got, labels = augment.apply(d, image[None, middle, middle], plane[middle, middle], crop)
    return got[0], labels


@pytest.mark.parametrize("scale", [2.0, 0.8])
def test_zoom_changes_the_slope_of_a_ramp(scale: float) -> None:
    """Twice as large: half the slope, about the middle of the crop."""
    down, right = np.mgrid[:120, :120].astype(np.float32)
    for axis, ramp in enumerate((down, right)):
        got, labels = cropped(replace(STRAIGHT, scale=scale), ramp)
        assert got.mean() == pytest.approx(ramp.mean(), abs=1e-3)
        np.testing.assert_allclose(np.diff(got, axis=axis), 1 / scale, atol=1e-3)
        np.testing.assert_allclose(np.diff(got, axis=1 - axis), 0, atol=1e-3)
        assert np.abs(ramp.ravel()[labels] - got).max() <= 0.5 + 1e-3, "the mask follows"


def test_nodes_move_pixels_by_what_they_say() -> None:
    """Nodes that all say (3, -2) take every pixel from 3 below and 2 to the left."""
    image = smooth(120)
    nodes = np.stack([np.full((4, 4), 3.0), np.full((4, 4), -2.0)])
    still, still_labels = cropped(STRAIGHT, np.roll(image, (-3, 2), (0, 1)))
    got, labels = cropped(replace(STRAIGHT, nodes=nodes), image)
    np.testing.assert_allclose(got, still, atol=1e-4)
    assert np.array_equal(labels, still_labels + 3 * 120 - 2)


def test_one_node_bends_only_around_it() -> None:
    """Where it stands by what it says, elsewhere less, to both sides of it alike."""
    nodes = np.zeros((2, 5, 5))
    nodes[0, 2, 2] = 4.0
    ramp = np.mgrid[:121, :121][0].astype(np.float32)
    crop = 33  # so that the middle node stands on a pixel
    bent = cropped(replace(STRAIGHT, nodes=nodes), ramp, crop)[0]
    moved = bent - cropped(STRAIGHT, ramp, crop)[0]
    assert moved[16, 16] == pytest.approx(4.0, abs=1e-3) and moved.max() <= 4.0 + 1e-3
    np.testing.assert_allclose(moved, moved[::-1, ::-1], atol=1e-3)
    assert np.abs(moved[[0, 0, -1, -1], [0, -1, 0, -1]]).max() < 0.5


@given(st.floats(0.5, 1.5), st.floats(-0.3, 0.3))
def test_contrast_and_brightness(gain: float, offset: float) -> None:
    image = np.random.default_rng(0).random((3, 8, 8), np.float32)
    plane = np.arange(64, dtype=np.int16).reshape(8, 8)
    d = replace(STRAIGHT, gain=gain, offset=offset)
    got, labels = augment.apply(d, image.copy(), plane, 8)
    wanted = [[[(v - 0.5) * gain + 0.5 + offset for v in row] for row in c] for c in image.tolist()]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.array_equal(labels, plane) and got.dtype == np.float32


def test_noise_has_the_spread_that_was_drawn() -> None:
    """100,000 pixels: the spread is known within 0.3 %, the mean within 0.0003 of a spread of 0.1."""
    image, plane = np.full((1, 320, 320), 0.25, np.float32), np.zeros((320, 320), np.int16)
    one, other = (
        augment.apply(replace(STRAIGHT, noise=0.1, noise_key=k), image, plane, 320)[0] - image
        for k in (1, 2)
    )
    for noise in (one, other):
        assert noise.std() == pytest.approx(0.1, rel=0.02) and abs(noise.mean()) < 2e-3
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(one[0, 1:].ravel(), one[0, :-1].ravel())[0, 1]) < 0.02
    again = augment.apply(replace(STRAIGHT, noise=0.1, noise_key=1), image, plane, 320)[0] - image
    assert np.array_equal(one, again)


def test_every_option_is_drawn() -> None:
    """Over many crops each of them takes its whole range."""
    cfg = AugmentConfig(warp_probability=1)
    draws = [augment.draw(cfg, CROP, 0, sample, 0) for sample in range(400)]
    for name, low, high in [
        ("angle_deg", -cfg.rotate_deg, cfg.rotate_deg),
        ("scale", 1 / (1 + cfg.zoom), 1 + cfg.zoom),
        ("gain", 1 - cfg.gain, 1 + cfg.gain),
        ("offset", -cfg.offset, cfg.offset),
        ("noise", 0, cfg.noise),
    ]:
        values = [getattr(d, name) for d in draws]
        near = 0.05 * (high - low)
        assert low <= min(values) < low + near and high - near < max(values) <= high, name
    bends = np.stack([d.nodes for d in draws])
    assert bends.std() == pytest.approx(cfg.elastic_px, rel=0.05)
    assert {d.turns for d in draws} == {0, 1, 2, 3} and {d.flip for d in draws} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
