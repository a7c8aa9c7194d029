"""Reading pictures: order, whole or not at all, and one stated rule for every pixel mode."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from raypipe.errors import BadImage, MissingInput, UnknownName
from raypipe.read import Decoded, ImageFolder, Undecodable, list_images, read_image, try_read_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 20, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read_bytes(tmp_path: Path, data: bytes) -> Decoded | Undecodable:
    return try_read_image(write(tmp_path / "x.bin", data))


def test_list_is_sorted_by_name_and_only_images(tmp_path: Path) -> None:
    for name in (
        "b.png",
        "a.JPG",
        "B.png",
        "10.webp",
        "9.webp",
        "._a.png",
        ".b.png",
        "c.txt",
        "png",
    ):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    names = [path.name for path in list_images(tmp_path)]
    assert names == ["10.webp", "9.webp", "B.png", "a.JPG", "b.png", "dangling.png"]


@pytest.mark.parametrize("make", [False, True])
def test_absent_or_empty_folder_is_named(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "images"
    if make:
        folder.mkdir()
        (folder / "readme.txt").touch()
    with pytest.raises(MissingInput, match=str(folder)) as caught:
        list_images(folder)
    assert "\n" not in str(caught.value)
    assert not make or ".png" in str(caught.value)


def test_pixels_digest_and_size(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(PIXELS), "PNG")
    image = read_image(write(tmp_path / "a.png", data))
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert image.pixels.dtype == np.uint8
    assert image.pixels.flags.c_contiguous
    assert (image.digest, image.size_bytes) == (xxhash.xxh3_128_hexdigest(data), len(data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF"])
def test_every_truncation_is_whole_or_refused(tmp_path: Path, kind: str) -> None:
    data = encoded(Image.fromarray(PIXELS), kind)
    whole = read_bytes(tmp_path, data)
    assert isinstance(whole, Decoded)
    refused = 0
    for length in range(0, len(data), 7 if len(data) > 500 else 1):
        outcome = read_bytes(tmp_path, data[:length])
        if isinstance(outcome, Decoded):
            np.testing.assert_array_equal(outcome.pixels, whole.pixels)
        else:
            refused += 1
            assert outcome.digest == xxhash.xxh3_128_hexdigest(data[:length])
            assert outcome.size_bytes == length
            assert outcome.reason
            assert "\n" not in outcome.reason
    assert refused > 0.9 * len(range(0, len(data), 7 if len(data) > 500 else 1))


def test_every_flipped_bit_of_a_png_is_seen(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(PIXELS[:6, :5]), "PNG")
    for place in range(len(data)):
        for bit in (0x01, 0x80):
            changed = bytearray(data)
            changed[place] ^= bit
            outcome = read_bytes(tmp_path, bytes(changed))
            assert isinstance(outcome, Undecodable) or (outcome.pixels == PIXELS[:6, :5]).all()


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200),
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]),
)
def test_any_bytes_come_back_as_an_outcome(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bytes
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd TIFF tags before it gives up
        outcome = read_bytes(tmp_path_factory.getbasetemp(), head + data)
    assert isinstance(outcome, Decoded | Undecodable)


def test_lenient_loading_is_never_switched_on() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_reason_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = (read_bytes(tmp_path, b"no image") for _ in range(2))
    assert first == second
    assert isinstance(first, Undecodable)
    assert first.reason == "ValueError: not an image of a known format"


def test_unreadable_paths_are_marked_not_raised(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("link.png", "folder.png"):
        outcome = try_read_image(tmp_path / name)
        assert isinstance(outcome, Undecodable)
        assert (outcome.digest, outcome.size_bytes) == ("", 0)
        with pytest.raises(BadImage, match=name):
            read_image(tmp_path / name)


def test_a_failing_disk_is_not_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output"):
        try_read_image(tmp_path / "a.png")


def as_read(tmp_path: Path, image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    outcome = read_bytes(tmp_path, encoded(image, kind, **options))
    assert isinstance(outcome, Decoded), outcome
    return outcome.pixels


def test_sixteen_bit_gray_keeps_one_scale(tmp_path: Path) -> None:
    wide = np.linspace(0, 65535, 24 * 20).astype(np.uint16).reshape(24, 20)
    for kind in ("PNG", "TIFF"):
        pixels = as_read(tmp_path, Image.fromarray(wide), kind)
        want = np.round(wide / 257).astype(np.uint8)
        for channel in range(3):
            np.testing.assert_array_equal(pixels[..., channel], want)
    dim = as_read(tmp_path, Image.fromarray(wide // 16))
    assert dim.max() == 16  # not stretched by the picture's own maximum


def test_gray_bits_palette_and_alpha(tmp_path: Path) -> None:
    gray = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(as_read(tmp_path, gray), np.repeat(PIXELS[..., :1], 3, axis=2))
    bits = gray.point(lambda value: 255 * (value > 100), mode="1")
    assert set(np.unique(as_read(tmp_path, bits))) == {0, 255}
    alpha = np.dstack([PIXELS, PIXELS[..., 0]])
    np.testing.assert_array_equal(as_read(tmp_path, Image.fromarray(alpha)), PIXELS)  # dropped
    palette = Image.fromarray(PIXELS).quantize(16)
    want = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(as_read(tmp_path, palette), want)
    seen = as_read(tmp_path, palette, transparency=bytes(range(16)))  # warns on the direct way
    np.testing.assert_array_equal(seen, want)


def test_no_agreed_range_is_refused(tmp_path: Path) -> None:
    for dtype in (np.int32, np.float32):
        outcome = read_bytes(
            tmp_path, encoded(Image.fromarray(PIXELS[..., 0].astype(dtype)), "TIFF")
        )
        assert isinstance(outcome, Undecodable)
        assert "no agreed range" in outcome.reason


def test_several_frames_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(PIXELS, k, axis=0)) for k in range(3)]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        outcome = read_bytes(tmp_path, data)
        assert isinstance(outcome, Undecodable), kind
        assert "3 frames" in outcome.reason


def test_orientation_tag_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    image = Image.fromarray(PIXELS)
    plain, tagged = as_read(tmp_path, image, "JPEG"), as_read(tmp_path, image, "JPEG", exif=exif)
    np.testing.assert_array_equal(plain, tagged)


def test_image_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my images"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        Image.fromarray(PIXELS).save(folder / name)
    source = ImageFolder.open(folder)
    assert [path.name for path in source.image_paths()] == ["a.png", "b.png"]
    assert (source.key, source.splits, source.shard_name()) == ("my-images", ("train",), "train")
    with pytest.raises(UnknownName, match="train"):
        source.image_paths("test")
    with pytest.raises(MissingInput):
        ImageFolder.open(tmp_path / "none")
