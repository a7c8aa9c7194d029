"""Images as rows: the scan that says which there are, and the pixels that a gatherer is given."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raypipe.backbone import Preprocess
from raypipe.errors import BadImage, ConfigError, InputError, MissingInput
from raypipe.stream import Gatherer, pixels
from raypipe.stream.pixels import PixelSource
from raypipe.stream.scan import Scan, read_seen, scan

N, SIZE = 9, 20
PLAIN = Preprocess()  # does not resize
SMALL = Preprocess(resize=16, crop=16)


def draw(folder: Path, n: int = N) -> list[Path]:
    generator = np.random.default_rng(0)
    for i in range(n):
        values = generator.integers(0, 256, (SIZE, SIZE + 4, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{i:02d}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return draw(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def seen(images: list[Path]) -> Scan:
    return scan(images, PLAIN)


@given(rows=st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=7), max_size=4))
def test_any_batches_are_the_files_pixels(
    images: list[Path], seen: Scan, rows: list[list[int]]
) -> None:
    source = pickle.loads(pickle.dumps(seen.source(PLAIN, readers=3)))
    with Gatherer({"pixels": source}, 7, depth=2) as gatherer:
        batches = gatherer.batches(np.array(some) for some in rows)
        for some, batch in zip(rows, batches, strict=True):
            want = [np.asarray(Image.open(images[row]).convert("RGB")) for row in some]
            np.testing.assert_array_equal(batch["pixels"].numpy(), want)


def test_rows_are_as_the_backbone_wants_its_pictures(images: list[Path], seen: Scan) -> None:
    source = seen.source(SMALL)
    assert source.row_shape == (16, 16, 3) and source.row_bytes == 768
    got = source.open().start(np.array([4]))()
    host = SMALL.host(np.asarray(Image.open(images[4]).convert("RGB")))
    np.testing.assert_array_equal(got[0], host)
    np.testing.assert_array_equal(source.decode_rows(np.array([4])), got)


def test_the_fingerprint_is_of_contents_not_of_places(
    images: list[Path], seen: Scan, tmp_path: Path
) -> None:
    for path in images:
        shutil.copyfile(path, tmp_path / path.name)  # with new times
    moved = sorted(tmp_path.iterdir())
    assert scan(moved, PLAIN).fingerprint == seen.fingerprint
    shutil.copyfile(images[1], moved[0])
    assert scan(moved, PLAIN).fingerprint != seen.fingerprint
    shutil.copyfile(images[0], moved[0])
    moved[0].rename(tmp_path / "00b.png")
    assert scan(sorted(tmp_path.iterdir()), PLAIN).fingerprint != seen.fingerprint


def test_a_known_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    paths = draw(tmp_path / "images", 4)
    paths[2].write_bytes(paths[2].read_bytes()[:150])
    first = scan(paths, SMALL)
    assert first.valid.tolist() == [True, True, False, True]
    (tmp_path / "kept.parquet").write_bytes(first.dumps())
    known = read_seen(tmp_path / "kept.parquet")
    asked = []

    def spy(path: Path, *rest: object) -> object:
        asked.append(path.name)
        return pixels.decode(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("raypipe.stream.scan.decode", spy)
    assert scan(paths, SMALL, known=known) == first and asked == []
    with pytest.raises(BadImage, match=r"02\.png: .*--on-bad-image mark"):
        scan(paths, SMALL, known=known, fail=True)
    asked.clear()
    shutil.copyfile(paths[0], paths[2])
    assert scan(paths, SMALL, known=known).valid.all() and asked == ["02.png"]
    assert read_seen(tmp_path / "none.parquet") == {}
    (tmp_path / "kept.parquet").write_bytes(b"not Parquet at all")
    assert read_seen(tmp_path / "kept.parquet") == {}


def test_what_is_no_pictures_own_fault_is_an_error(tmp_path: Path) -> None:
    paths = draw(tmp_path, 3)
    Image.new("RGB", (5, 6)).save(paths[1])
    with pytest.raises(InputError, match=r"01\.png has 6x5 pixels, the first image 20x24"):
        scan(paths, PLAIN)
    assert scan(paths, SMALL).valid.all()
    paths[1].unlink()
    paths[1].symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"01\.png cannot be opened"):
        scan(paths, SMALL)
    for path in paths:
        path.unlink()
        path.write_bytes(b"nothing")
    with pytest.raises(BadImage, match="not one image can be read"):
        scan(paths, SMALL)
    with pytest.raises(MissingInput, match="no images"):
        scan([], SMALL)


def test_a_source_that_contradicts_itself_is_refused(seen: Scan) -> None:
    fields = vars(seen.source(PLAIN))
    with pytest.raises(ConfigError, match="bytes of digests"):
        PixelSource(**{**fields, "names": fields["names"][:2]})
