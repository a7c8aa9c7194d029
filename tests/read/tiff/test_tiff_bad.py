"""Files that cannot be read, or not any more: one clear line each, and never other pixels."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiff_kit import KINDS, directory, values, write_pages

from raypipe.errors import InputError
from raypipe.read.tiff import decoder, load_tiff_stack, open_tiff
from raypipe.read.tiff.kept import kept

CUT = ["contiguous", "deflate", "LZW", "tiled, deflate", "pages apart", "pages evenly apart"]
CUT += ["BigTIFF, deflate", "OME", "OME, deflate", "ImageJ", "big-endian", "RGB in planes, tiled"]


class Files(dict[str, tuple[str, bytes, np.ndarray]]):
    """Not printed whole where an example fails."""

    def __repr__(self) -> str:
        return f"{len(self)} files"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Files:
    """Name and bytes of a file of each kind, and what tifffile reads from it."""
    made = Files()
    for name in CUT:
        kind = KINDS[name]
        path = kind.write(tmp_path_factory.mktemp("kind"), values(kind.shape, kind.dtype))
        made[name] = path.name, path.read_bytes(), tifffile.imread(path)
    return made


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    """The message is one line, and has these in it."""
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("name", CUT)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_is_not_whole(tmp_path, whole, name, data):
    """An error, or all pixels (what was cut off was not needed); never fewer or other ones."""
    file, content, expected = whole[name]
    last = len(content) - 1
    size = data.draw(st.integers(0, last) | st.integers(last - 300, last))
    path = tmp_path / file
    path.write_bytes(content[:size])
    try:
        got = np.asarray(load_tiff_stack(path))
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        np.testing.assert_array_equal(got, expected)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(CUT),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_a_damaged_head_is_an_input_error(tmp_path, whole, name, flips):
    file, whole_file, _ = whole[name]
    path, content = tmp_path / file, bytearray(whole_file)
    for at, value in flips:
        content[at] = value
    path.write_bytes(content)
    try:
        stack = load_tiff_stack(path)
        if stack.nbytes < 1 << 26:
            np.asarray(stack)
    except InputError as error:
        assert "\n" not in str(error)
    except MemoryError:
        pass  # the head now tells of a strip of terabytes: nothing says that there is none


def test_whatever_tifffile_raises_on_damaged_tags_is_an_input_error(tmp_path, monkeypatch):
    """Seen: a TypeError, where a tag that it divides by held two values."""
    path = KINDS["deflate"].write(tmp_path, values())

    def divide(*_):
        return 8 / (1, 2)

    monkeypatch.setattr(decoder, "key_page", divide)
    with pytest.raises(InputError) as error:
        np.asarray(load_tiff_stack(path))
    one_line(error, str(path), "unsupported operand", "copy it again")


def test_a_damaged_strip_is_named(tmp_path):
    path = KINDS["deflate"].write(tmp_path, values())
    with tifffile.TiffFile(path) as tif:
        start, size = tif.pages[2].dataoffsets[1], tif.pages[2].databytecounts[1]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * size)
    stack = open_tiff(path)
    stack.read(2, slice(0, 8))  # the strip above is whole
    with pytest.raises(InputError) as error:
        stack.read(2, slice(8, 9))
    one_line(error, str(path), "strip or tile 1", "copy it again")


@pytest.mark.parametrize(("tag", "harmless"), [(305, True), (270, False), (273, False)])
def test_a_wrong_tag_matters_if_pixels_depend_on_it(tmp_path, tag, harmless):
    """305: the program's name; 270: the description, which has the shape; 273: the strips."""
    path = KINDS["deflate"].write(tmp_path, values())
    with tifffile.TiffFile(path, mode="r+") as tif:
        at = tif.pages[0].tags[tag].offset
    with path.open("r+b") as file:
        file.seek(at + 2)
        file.write((24324).to_bytes(2, "little"))  # no such type
    if harmless:
        stack = load_tiff_stack(path)
        np.testing.assert_array_equal(np.asarray(stack), values())
        assert f"tag {tag}: invalid data type" in stack.source.why[0]
        return
    with pytest.raises(InputError, match=r"cannot be (trusted|read)") as error:
        load_tiff_stack(path)
    one_line(error, str(path), "copy or convert it again")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"GIF89a and more of it", "not a TIFF file"),
        (b"II*\0" + b"\0" * 20, "no image"),
        (b"II*\0" + (4000).to_bytes(4, "little"), "cannot be trusted|no image|cannot be read"),
    ],
)
def test_what_is_no_tiff(tmp_path, content, said):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        open_tiff(path)
    one_line(error, str(path))


def test_a_chain_that_bites_its_tail(tmp_path):
    page = values((9, 11))
    block = len(directory(11, 9, 0, 0, 0))
    step = block + page.nbytes
    with (tmp_path / "a.tif").open("wb") as file:
        file.write(b"II*\0" + (8).to_bytes(4, "little"))
        for k in range(3):
            after = 8 + (k + 1) % 3 * step
            file.write(directory(11, 9, 8 + k * step + block, page.nbytes, after) + page.tobytes())
    with pytest.raises(InputError, match="leads from its last page back"):
        open_tiff(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["contiguous", "deflate, one strip", "tiled"])
def test_a_file_cut_short_while_it_is_open(tmp_path, name):
    path = KINDS[name].write(tmp_path, values())
    stack = open_tiff(path)
    stack.read(0)
    kept.give_back()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"not whole|cut short"):
        stack.read(4)


@pytest.mark.parametrize("name", ["contiguous", "deflate"])
def test_a_file_that_was_changed_since(tmp_path, name):
    path = KINDS[name].write(tmp_path, values())
    stack = open_tiff(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="was changed since the stack was opened"):
        stack.read(0)
    path.unlink()
    with pytest.raises(InputError, match="is not there"):
        stack.read(0)


def test_even_pages_that_are_not_all_even(tmp_path):
    """Where a look at some pages is not enough, the chain is walked."""
    expected = values((40, 9, 11))
    path = write_pages(tmp_path / "a.tif", expected)
    content = path.read_bytes()
    path.write_bytes(content + b"trailing")
    np.testing.assert_array_equal(np.asarray(load_tiff_stack(path)), expected)
    path.write_bytes(content + b"\0" * (9 * 11 * 2 + 200))  # room for one more page: there is none
    np.testing.assert_array_equal(np.asarray(load_tiff_stack(path)), expected)


_WITHOUT = """
import sys
sys.modules["imagecodecs"] = None
from raypipe.read.tiff import open_tiff
print(open_tiff(sys.argv[2]).read(0).sum())
try:
    open_tiff(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_missing_codec_is_named_when_the_file_is_opened(tmp_path):
    lzw = KINDS["LZW"].write(tmp_path, values()).rename(tmp_path / "lzw.tif")
    deflate = KINDS["deflate, one strip"].write(tmp_path, values())
    argv = [sys.executable, "-c", _WITHOUT, str(lzw), str(deflate)]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == str(values()[0].sum())  # deflate is tifffile's own
    assert said[1].startswith("InputError")
    assert all(word in said[1] for word in ("lzw.tif", "LZW", "pip install imagecodecs"))


def test_a_compression_that_nobody_knows(tmp_path):
    path = tmp_path / "a.tif"
    page = values((9, 11))
    head = directory(11, 9, 8 + len(directory(0, 0, 0, 0, 0)), page.nbytes, 0)
    unknown = head.replace(b"\x03\x01\x03\0\x01\0\0\0\x01\0", b"\x03\x01\x03\0\x01\0\0\0\x39\x30")
    path.write_bytes(b"II*\0" + (8).to_bytes(4, "little") + unknown + page.tobytes())
    with pytest.raises(InputError, match="compressed by 12345, which tifffile does not read"):
        open_tiff(path)
