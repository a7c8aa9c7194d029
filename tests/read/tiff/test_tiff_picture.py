"""PNG and JPEG as image sources: samples as stored; and one protocol for all 2-D inputs."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tifffile
from PIL import Image
from tiff_kit import values

from raypipe.errors import BadImage, ConfigError, InputError, MissingInput
from raypipe.read import picture
from raypipe.read.source2d import ImageSource, open_image

PICTURES = {
    "grey": values((20, 30), "u1"),
    "grey 16": values((20, 30), "u2"),
    "rgb": values((20, 30, 3), "u1"),
    "rgba": values((20, 30, 4), "u1"),
    "grey alpha": values((20, 30, 2), "u1"),
    "bits": values((20, 30), "?"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_png_gives_what_was_put_in(tmp_path, name):
    expected = PICTURES[name]
    Image.fromarray(expected).save(tmp_path / "a.png")
    source = pickle.loads(pickle.dumps(open_image(tmp_path / "a.png")))
    assert isinstance(source, ImageSource)
    assert (source.shape, source.dtype) == ((1, *expected.shape), expected.dtype)
    np.testing.assert_array_equal(source.read(0), expected)
    crop = source.read(0, slice(3, 9), slice(10, 30))
    np.testing.assert_array_equal(crop, expected[3:9, 10:30])
    crop[...] = 0
    np.testing.assert_array_equal(source.read(0), expected)


def test_a_palette_gives_its_indices(tmp_path):
    labels = values((20, 30), "u1") % 7
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.reshape(-1).tolist())
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(open_image(tmp_path / "mask.png").read(0), labels)


def test_a_jpeg(tmp_path):
    Image.fromarray(PICTURES["rgb"]).save(tmp_path / "a.jpg")
    expected = np.asarray(Image.open(tmp_path / "a.jpg"))
    np.testing.assert_array_equal(open_image(tmp_path / "a.jpg").read(0), expected)


def test_a_file_is_known_by_its_bytes(tmp_path):
    expected = values((4, 9, 11))
    tifffile.imwrite(tmp_path / "a.png", expected, photometric="minisblack")
    source = open_image(str(tmp_path / "a.png"))
    assert isinstance(source, ImageSource)
    np.testing.assert_array_equal(source.read(3, slice(1, 5)), expected[3, 1:5])


def test_16_bit_colours_are_refused_not_cut(tmp_path):
    import imagecodecs

    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values((20, 30, 3), "u2")))
    with pytest.raises(BadImage, match="cut to 8 bits; save it as TIFF"):
        open_image(tmp_path / "a.png")


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(MissingInput, match="is not there"):
        open_image(path)
    path.write_bytes(b"no picture at all")
    with pytest.raises(BadImage, match="no known format"):
        open_image(path)
    Image.fromarray(PICTURES["grey"]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImage, match="cannot be read"):
        open_image(path)
    frames = [Image.fromarray(PICTURES["grey"]), Image.fromarray(PICTURES["grey"][::-1])]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match="holds 2 frames"):
        open_image(tmp_path / "a.gif")


def test_a_picture_is_decoded_once_for_all_its_crops(tmp_path, monkeypatch):
    """With its mask, and with a compressed stack read in between, whose page is smaller."""
    stack = values((2, 20, 30), "u1")
    tifffile.imwrite(tmp_path / "a.tif", stack, compression="zlib", photometric="minisblack")
    decoded = []
    decode = picture._decode
    monkeypatch.setattr(picture, "_decode", lambda path: decoded.append(path.name) or decode(path))
    for name in ("rgb", "grey"):
        Image.fromarray(PICTURES[name]).save(tmp_path / f"{name}.png")
    image, mask, other = (open_image(tmp_path / n) for n in ("rgb.png", "grey.png", "a.tif"))
    for top in range(10):
        rows = slice(top, top + 9)
        np.testing.assert_array_equal(image.read(0, rows), PICTURES["rgb"][rows])
        np.testing.assert_array_equal(mask.read(0, rows), PICTURES["grey"][rows])
        np.testing.assert_array_equal(other.read(1, rows), stack[1, rows])
    assert decoded == ["rgb.png", "grey.png"]


@pytest.mark.parametrize(("name", "bytes_"), [("rgb", 1800), ("grey 16", 1200), ("bits", 600)])
def test_a_picture_too_large_to_keep_is_refused(tmp_path, monkeypatch, name, bytes_):
    Image.fromarray(PICTURES[name]).save(tmp_path / "a.png")
    monkeypatch.setattr(picture, "KEEP_BYTES", bytes_)
    assert open_image(tmp_path / "a.png").shape[1:3] == (20, 30)
    monkeypatch.setattr(picture, "KEEP_BYTES", bytes_ - 1)
    with pytest.raises(InputError, match=r"30 x 20 pixels .* save it as a tiled TIFF"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("most", [599, 300])  # Pillow warns above it, and stops above twice as many
def test_what_pillow_takes_for_a_bomb(tmp_path, monkeypatch, most):
    Image.fromarray(PICTURES["grey"]).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most - (most == 300))
    with pytest.raises(InputError, match=r"too large .* save it as a tiled TIFF"):
        open_image(tmp_path / "a.png")


def test_a_picture_that_was_changed(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PICTURES["grey"]).save(path)
    source = open_image(path)
    with pytest.raises(ConfigError, match="which has 1"):
        source.read(1)
    Image.fromarray(PICTURES["rgb"]).save(path)
    with pytest.raises(InputError, match="was changed while in use"):
        source.read(0)
