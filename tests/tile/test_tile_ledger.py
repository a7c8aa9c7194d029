"""What a tiled run keeps on the disk: one writer at a time, room asked for once, whole tiles alone count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tile_runs import Slow, image, opened, run, write_all

import raypipe
from raypipe.errors import Fenced, MemoryBudgetExceeded, NoSpace, StoreError, StoreLocked
from raypipe.store import space
from raypipe.tile.grid import TileGrid
from raypipe.tile.ledger import DONE, TileRun, TileWriter, paths_of
from raypipe.tile.output import OutputSpec
from raypipe.tile.worker import TileItem


def test_a_foreign_file_is_overwritten_only_by_a_complete_result(tmp_path: Path) -> None:
    (tmp_path / "out.npy").write_text("mine")
    with opened(tmp_path / "out.npy", overwrite=True) as begun:
        assert (tmp_path / "out.npy").read_text() == "mine"
        assert begun.missing_bytes() == 100 * 9, (
            "its own file is preallocated, the other does not count"
        )
        write_all(begun)
        begun.finish()
    assert (np.load(tmp_path / "out.npy") == 7).all()


def test_a_result_that_got_its_name_is_not_asked_room_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between the last rename and the manifest, on a disk that is then full."""
    out, write_manifest = tmp_path / "a.npy", TileRun._write_manifest

    def ends(run: TileRun, state: str) -> None:
        if state == DONE:
            raise KeyboardInterrupt
        write_manifest(run, state)

    with monkeypatch.context() as patch, opened(out) as first:
        patch.setattr(TileRun, "_write_manifest", ends)
        write_all(first)
        with pytest.raises(KeyboardInterrupt):
            first.finish()
    assert out.exists() and not first.paths.partial.exists()
    assert json.loads(first.paths.manifest.read_text())["state"] == "writing"
    other = TileRun(first.spec, {"model": "b"}, "run")
    assert other.missing_bytes() >= first.spec.nbytes, "nothing of it is there"
    monkeypatch.setattr(space, "free_bytes", lambda path: 100 * 9)
    with opened(out) as second:
        assert second.kept == 9 and not len(second.missing())
        second.finish()
    assert (np.load(out) == 7).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npy.tiles.json"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(small_disk: Path) -> None:
    with pytest.raises(NoSpace, match="too few"):
        raypipe.process_large_image(
            image().repeat(2, 0), Slow(), 70, small_disk / "out.npy", halo=1, align=1
        )
    assert list(small_disk.iterdir()) == []


def test_what_a_zarr_has_on_the_disk_is_not_asked_for_again(tmp_path: Path) -> None:
    """A run that goes on where little is left free must not be refused."""
    run(tmp_path / "out.zarr", Slow())
    spec = OutputSpec(
        path=tmp_path / "out.zarr", grid=TileGrid.of((500, 500), (70, 70), (1, 1), (1, 1)), frames=1,
        channels=1, dtype="float32", keep_frames=False, keep_channels=False,
    )  # fmt: skip
    fresh = TileRun(spec, {}, "run")
    assert fresh.missing_bytes() == 4 * 560 * 560 + 100 * 64  # chunks at the end are stored whole
    (tmp_path / "out.zarr").rename(fresh.paths.partial)
    stored = sum(p.stat().st_size for p in fresh.paths.partial.rglob("*") if p.is_file())
    assert stored >= 4 * 560 * 560 and fresh.missing_bytes() == 100 * 64


def test_only_what_is_on_the_disk_counts(tmp_path: Path) -> None:
    """A committed tile whose bytes changed since is computed again; one not committed too."""
    out = tmp_path / "a.npy"
    with opened(out) as first:
        writer = TileWriter(first.target, "w")
        for number in range(4):
            writer.write(number, np.full((1, 20, 20), number + 1))
            if number < 3:
                writer.commit()
        writer.close()
    with paths_of(out).partial.open("r+b") as file:
        file.seek(128 + 60 * 3 + 25)  # a pixel of tile 1
        file.write(b"\xff")
    with opened(out) as second:
        assert second.kept == 2 and list(second.missing()) == [1, *range(3, 9)]
        with pytest.raises(StoreError, match="lacks 7 of 9 tiles"):
            second.finish()


def test_one_run_at_a_time_and_old_writers_are_shut_out(tmp_path: Path) -> None:
    with opened(tmp_path / "a.npy") as first:
        old = TileWriter(first.target, "w")
        with pytest.raises(StoreLocked, match="is being written by pid"):
            opened(tmp_path / "a.npy")
    with opened(tmp_path / "a.npy"), pytest.raises(Fenced, match="superseded"):
        old.write(0, np.zeros((1, 20, 20), np.uint8))
    old.close()


def test_items_shrink_until_they_cannot() -> None:
    item = TileItem(frame=0, tiles=(3, 4), batch_limit=2)
    smaller = item.with_less_memory()
    assert smaller.batch_limit == 1 and smaller.key == item.key == (0, 3)
    assert item.at_most(smaller) == smaller
    with pytest.raises(MemoryBudgetExceeded, match="smaller chunk_size"):
        smaller.with_less_memory()


def test_what_it_was_made_of_is_kept(tmp_path: Path) -> None:
    run(tmp_path / "out.npy", Slow())
    fields = json.loads((tmp_path / "out.npy.tiles.json").read_text())
    assert fields["state"] == "done" and fields["identity"]["halo"] == [1, 1]
