"""Items cover exactly what is missing, on the grid."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import BadImage, ConfigError, InputError, MissingInput
from raypipe.extract.config import ExtractConfig
from raypipe.extract.plan import Group, cut_items, find_groups, image_hw, union


@given(
    rows=st.integers(1, 300),
    grid=st.integers(1, 40),
    workers=st.integers(1, 9),
    row_bytes=st.integers(1, 10**8),
    data=st.data(),
)
def test_items_cover_the_missing_cells_once(
    rows: int, grid: int, workers: int, row_bytes: int, data: st.DataObject
) -> None:
    group = Group("01", "train", tuple(Path(f"{i}.png") for i in range(rows)))
    cells = [(lo, min(lo + grid, rows)) for lo in range(0, rows, grid)]
    missing = [cell for cell in cells if data.draw(st.booleans())]
    items = cut_items(group, missing, grid=grid, row_bytes=row_bytes, workers=workers)
    got = [(lo, paths) for item in items for lo, paths in item.cells()]
    assert got == [(lo, group.paths[lo:hi]) for lo, hi in missing]
    assert len({item.key for item in items}) == len(items)


def test_a_range_off_the_grid_is_refused() -> None:
    group = Group("01", "train", tuple(Path(f"{i}.png") for i in range(20)))
    with pytest.raises(InputError, match="not on the grid"):
        cut_items(group, [(3, 8)], grid=4, row_bytes=1, workers=1)


@given(st.lists(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9))), max_size=4))
def test_the_union_of_ranges_holds_each_row_once(parts: list[list[tuple[int, int]]]) -> None:
    spans = [[(lo, lo + n) for lo, n in part] for part in parts]
    merged = union(spans)
    rows = [row for lo, hi in merged for row in range(lo, hi)]
    assert rows == sorted({row for part in spans for lo, hi in part for row in range(lo, hi)})


def test_a_plain_folder_is_one_group(images: Path, tmp_path: Path) -> None:
    (group,) = find_groups(ExtractConfig(data_dir=images, output_dir=tmp_path))
    assert (group.key, len(group.paths)) == (f"{images.name}/train", 48)
    assert list(group.names) == sorted(group.names)
    assert image_hw([group]) == (256, 256)


def test_a_plain_folder_has_one_subject_and_one_split(images: Path, tmp_path: Path) -> None:
    for options in ({"subj": ("01", "02")}, {"split": ("test",)}):
        with pytest.raises(ConfigError, match="plain images"):
            find_groups(ExtractConfig(data_dir=images, output_dir=tmp_path, **options))


def test_a_subject_named_in_two_ways_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "subj01" / "training_split" / "training_images"
    folder.mkdir(parents=True)
    (folder / "train-0001_nsd-00001.png").touch()
    cfg = ExtractConfig(data_dir=tmp_path, output_dir=tmp_path, subj=("01", "1", "subj01"))
    assert [group.key for group in find_groups(cfg)] == ["01/train"]


def test_empty_and_unreadable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="neither subjNN folders nor images"):
        find_groups(ExtractConfig(data_dir=tmp_path, output_dir=tmp_path))
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(BadImage, match="not one image can be read"):
        image_hw(find_groups(ExtractConfig(data_dir=tmp_path, output_dir=tmp_path)))


@pytest.mark.parametrize("option", ["batch_size", "decode_threads", "workers", "image_size"])
def test_options_below_one_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match="below 1"):
        ExtractConfig(data_dir=tmp_path, output_dir=tmp_path, **{option: 0})  # type: ignore[arg-type]
