"""Checkpoints on disk: whole or absent, damaged ones give way, room is asked for, old ones go."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import (
    StopAfter,
    ToyTask,
    config,
    losses,
    run,
    same_run,
)

from raypipe.errors import MissingInput, NoSpace, StoreCorrupt
from raypipe.train import checkpoint, load_model_state


@pytest.mark.parametrize("file", ["model.pt", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    noisy: ToyTask, tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(epochs=2)
    run(noisy, cfg, tmp_path / "whole")
    run(noisy, cfg, tmp_path / "broken", should_stop=StopAfter(9))
    path = tmp_path / "broken" / "last" / file
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half] ^= 255
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "short": content[:-1], "flipped": content}[damage])
    if file == "meta.json" and damage == "flipped":
        path.write_bytes(b"{]")
    with caplog.at_level(logging.WARNING):
        run(noisy, cfg, tmp_path / "broken")
    assert "last-1" in caplog.text
    same_run(tmp_path / "broken", tmp_path / "whole")


def test_no_whole_checkpoint_is_an_error_not_a_new_start(noisy: ToyTask, tmp_path: Path) -> None:
    run(noisy, config(), tmp_path / "run")
    for folder in ("last", "last-1"):
        (tmp_path / "run" / folder / "state.pt").write_bytes(b"torn")
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(StoreCorrupt, match=r"no checkpoint in .* is whole"):
        run(noisy, config(), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
    run(noisy, config(), tmp_path / "run", resume=False)
    assert len(losses(tmp_path / "run")) == 18


def test_bytes_on_disk_are_those_that_starting_over_frees(noisy: ToyTask, tmp_path: Path) -> None:
    assert checkpoint.on_disk_bytes(tmp_path / "none") == 0
    run(noisy, config(), tmp_path)
    (tmp_path / ".last.writing").mkdir()
    (tmp_path / ".last.writing" / "model.pt").write_bytes(bytes(1000))

    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    there, before = checkpoint.on_disk_bytes(tmp_path), size()
    checkpoint.discard(tmp_path)
    assert there == before - size() > 1000 and checkpoint.on_disk_bytes(tmp_path) == 0


def test_keep_is_how_many_generations_stay(noisy: ToyTask, tmp_path: Path) -> None:
    for keep in (1, 3):
        folder = tmp_path / str(keep)
        run(noisy, config(keep=keep), folder)
        assert len(list(folder.glob("last*"))) == keep
        assert len(list(folder.glob("best*"))) == 1
        assert not list(folder.glob(".*"))


def test_a_full_disk_keeps_the_checkpoint_that_is_there(
    noisy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(noisy, config(epochs=1), tmp_path / "run")
    before = load_model_state(tmp_path / "run" / "last")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(NoSpace, match="free space, then run the same command"):
            run(noisy, config(epochs=2), tmp_path / "run")
    after = load_model_state(tmp_path / "run" / "last")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not list((tmp_path / "run").glob(".*"))
    run(noisy, config(epochs=2), tmp_path / "run")
    run(noisy, config(epochs=2), tmp_path / "whole")
    same_run(tmp_path / "run", tmp_path / "whole")


def test_a_really_full_disk_is_no_space(noisy: ToyTask, mount: Callable[[str, str], Path]) -> None:
    disk = mount("tmpfs", "size=64k")
    (disk / "filler").write_bytes(bytes(48 * 1024))
    with pytest.raises(NoSpace, match="disk is full"):
        run(noisy, config(epochs=1), disk / "run")
    (disk / "filler").unlink()
    run(noisy, config(epochs=1, keep=1), disk / "run")


def test_space_is_asked_for_before_a_byte_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    huge = torch.zeros(1).expand(free // 4 + 1)  # as large as the disk, but for its storage
    with pytest.raises(NoSpace, match=rf"about {huge.nbytes} bytes, \d+ are free"):
        checkpoint.save(tmp_path, "last", {"state": {"deep": [huge]}}, {})
    assert not list(tmp_path.iterdir())


def test_load_model_state_finds_the_best(noisy: ToyTask, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(MissingInput, match="train first"):
        load_model_state(folder)
    result = run(noisy, config(), folder)
    assert checkpoint.find_checkpoint(folder).meta["progress"]["best_epoch"] == result.best_epoch
    for path in (folder, folder / "best", folder / "last", folder / "last-1", str(folder)):
        assert set(load_model_state(path)) == set(noisy.build_model().state_dict())
    moved = tmp_path / "elsewhere"
    (folder / "best").rename(moved)
    assert load_model_state(moved)
    (moved / "model.pt").write_bytes(b"")
    with pytest.raises(StoreCorrupt, match=r"model\.pt is not as it was written"):
        load_model_state(moved)
    with pytest.raises(MissingInput):
        load_model_state(tmp_path / "nowhere" / "best")


def test_meta_is_plain_json(noisy: ToyTask, tmp_path: Path) -> None:
    run(noisy, config(), tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "last" / "meta.json").read_text())
    assert meta["progress"]["epoch"] == 3
    assert meta["stream"]["rows_per_step"] == 8
    assert meta["judged"] is True
    assert set(meta["files"]) == {"model.pt", "state.pt"}


@pytest.mark.parametrize(
    ("validated", "step", "owes", "epoch"),
    [
        (0, 0, False, None), (0, 4, False, None), (0, 0, True, 0),
        (2, 0, False, 1), (2, 4, False, 2), (2, 0, True, 2),
    ],
)  # fmt: skip
def test_weights_are_of_the_epoch_whose_steps_are_in_them(
    tmp_path: Path, validated: int, step: int, owes: bool, epoch: int | None
) -> None:
    history = [{"epoch": n} for n in range(validated)]
    progress = {"history": history, "step": step, "owes_validation": owes}
    found = checkpoint.Found(tmp_path, {"progress": progress})
    assert found.epoch == epoch and type(found.epoch) is type(epoch)
    if not owes:  # earlier versions had no word of it
        del progress["owes_validation"]
        assert found.epoch == epoch
    assert checkpoint.Found(tmp_path, {}).epoch is None
