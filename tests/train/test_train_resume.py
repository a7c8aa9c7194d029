"""Checkpoints: whole or absent, at every point of a crash; a resumed run equals the unbroken one."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import (
    Clock,
    KillAfter,
    Killed,
    StopAfter,
    ToyTask,
    config,
    losses,
    records,
    run,
)

from raypipe.errors import ConfigError, MissingInput, NoSpace, StoreCorrupt
from raypipe.train import checkpoint, load_model_state


@pytest.fixture
def noisy(toy: ToyTask) -> ToyTask:
    """The toy with dropout: resuming must restore the generators too."""
    return replace(toy, dropout=0.4)


def same_run(a: Path, b: Path) -> None:
    """Same log (but for the clock), same last and best weights, to the bit."""

    def timeless(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder)]

    assert timeless(a) == timeless(b)
    for name in ("last", "best"):
        ours, theirs = load_model_state(a / name), load_model_state(b / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kill_at", [1, 2, 5, 6, 7, 12, 17])
def test_a_killed_run_goes_on_as_if_nothing_happened(
    noisy: ToyTask, tmp_path: Path, kill_at: int
) -> None:
    cfg = config(checkpoint_every_steps=2, schedule="cosine", warmup_steps=3)
    run(noisy, cfg, tmp_path / "whole")
    with pytest.raises(Killed):
        run(noisy, cfg, tmp_path / "broken", should_stop=KillAfter(kill_at))
    run(noisy, cfg, tmp_path / "broken")
    same_run(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize(
    ("every_s", "saved"), [(0, [6, 12, 18]), (2, [3, 6, 9, 12, 15, 18]), (5, [6, 12, 18])]
)
def test_a_checkpoint_is_written_when_its_time_has_come(
    noisy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_s: int, saved: list[int]
) -> None:
    """Due every_s steps after the last one; known, and done, a step later; epochs have 6 steps."""
    real, at = checkpoint.save, []

    def note(run_dir: Path, name: str, contents: Any, meta: Any, keep: int = 1) -> Path:
        if name == "last":
            at.append(meta["progress"]["global_step"])
        return real(run_dir, name, contents, meta, keep)

    monkeypatch.setattr(checkpoint, "save", note)
    clock = Clock()
    timed = {"clock": clock, "should_stop": clock.tick}
    run(noisy, config(checkpoint_every_s=every_s), tmp_path / "run", **timed)
    assert at == saved


@pytest.mark.parametrize("kill_at", [2, 4, 5, 6, 8, 11, 16])
def test_a_run_saved_by_time_goes_on_as_if_nothing_happened(
    noisy: ToyTask, tmp_path: Path, kill_at: int
) -> None:
    cfg = config(checkpoint_every_s=2, amp="fp16", init_scale=2.0**18)
    run(noisy, config(amp="fp16", init_scale=2.0**18), tmp_path / "whole")
    clock = Clock(then=KillAfter(kill_at))
    with pytest.raises(Killed):
        run(noisy, cfg, tmp_path / "broken", clock=clock, should_stop=clock.tick)
    found = checkpoint.newest(tmp_path / "broken")
    assert (found.meta["progress"]["global_step"] if found else 0) == (kill_at - 1) // 3 * 3
    run(noisy, cfg, tmp_path / "broken")
    same_run(tmp_path / "broken", tmp_path / "whole")


def test_a_run_killed_again_and_again_gets_there(noisy: ToyTask, tmp_path: Path) -> None:
    cfg = config(checkpoint_every_steps=1, amp="fp16", init_scale=2.0**18)
    run(noisy, cfg, tmp_path / "whole")
    for _ in range(30):
        try:
            run(noisy, cfg, tmp_path / "broken", should_stop=KillAfter(3))
            break
        except Killed:
            continue
    same_run(tmp_path / "broken", tmp_path / "whole")


def test_a_crash_at_any_point_of_a_checkpoint_is_survived(
    noisy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die at the k-th file operation of the whole run's checkpoints, for every k."""
    cfg = config(epochs=2, keep=2)
    run(noisy, cfg, tmp_path / "whole")
    operations = 0
    die_at = -1

    def counted(real: Any) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal operations
            operations += 1
            if operations == die_at:
                raise Killed
            return real(*args, **kwargs)

        return operation

    for owner, name in ((os, "fsync"), (Path, "rename"), (shutil, "rmtree"), (torch, "save")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    run(noisy, cfg, tmp_path / "count")
    total = operations
    assert total > 20
    for point in range(1, total + 1):
        folder = tmp_path / f"broken-{point}"
        operations, die_at = 0, point
        with pytest.raises(Killed):
            run(noisy, cfg, folder)
        die_at = -1
        run(noisy, cfg, folder)
        same_run(folder, tmp_path / "whole")
        assert not list(folder.glob(".*.writing"))


def test_sigkill_of_a_real_process_is_survived(noisy: ToyTask, tmp_path: Path) -> None:
    cfg = config(checkpoint_every_steps=1)
    run(noisy, cfg, tmp_path / "whole")
    script = textwrap.dedent(
        f"""
        import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from train_helpers import ToyTask, config, run
        task = ToyTask(Path({str(noisy.data)!r}), dropout={noisy.dropout})
        step = lambda r: (print(r["global_step"], flush=True), time.sleep(0.05))
        run(task, config(checkpoint_every_steps=1), Path({str(tmp_path / "broken")!r}), on_step=step)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 8:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(losses(tmp_path / "broken")) < 18
    run(noisy, cfg, tmp_path / "broken")
    same_run(tmp_path / "broken", tmp_path / "whole")


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


def test_a_finished_run_does_nothing_more(noisy: ToyTask, tmp_path: Path) -> None:
    first = run(noisy, config(), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    second = run(noisy, config(), tmp_path / "run")
    assert second.history == first.history
    assert (second.best_epoch, second.global_steps) == (first.best_epoch, 18)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_more_epochs_go_on_from_a_finished_run(noisy: ToyTask, tmp_path: Path) -> None:
    run(noisy, config(epochs=4), tmp_path / "whole")
    run(noisy, config(epochs=2), tmp_path / "longer")
    run(noisy, config(epochs=4), tmp_path / "longer")
    same_run(tmp_path / "longer", tmp_path / "whole")


def test_a_run_may_go_on_in_smaller_micro_batches(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(batch_size=8), tmp_path / "whole")
    run(toy, config(batch_size=8), tmp_path / "run", should_stop=StopAfter(8))
    run(toy, config(batch_size=2, accumulate=4), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_resume_false_starts_over(noisy: ToyTask, tmp_path: Path) -> None:
    run(noisy, config(epochs=1), tmp_path / "run")
    run(noisy, config(epochs=2, seed=5), tmp_path / "run", resume=False)
    run(noisy, config(epochs=2, seed=5), tmp_path / "fresh")
    same_run(tmp_path / "run", tmp_path / "fresh")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 0.5}, r"lr 0.01 -> 0.5"),
        ({"seed": 9}, "seed 0 -> 9"),
        ({"amp": "bf16"}, "amp"),
        ({"batch_size": 16}, "8 rows a step"),
    ],
)
def test_another_recipe_is_refused(
    noisy: ToyTask, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    run(noisy, config(epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match=says):
        run(noisy, config(**({"epochs": 2} | change)), tmp_path / "run")


def test_other_rows_or_another_model_are_refused(noisy: ToyTask, tmp_path: Path) -> None:
    run(noisy, config(epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="other rows"):
        run(replace(noisy, n_train=42), config(epochs=2), tmp_path / "run")
    with pytest.raises(ConfigError, match="does not fit this model"):
        run(replace(noisy, conv=True), config(epochs=2), tmp_path / "run")


def test_other_content_is_refused_by_name(noisy: ToyTask, tmp_path: Path) -> None:
    run(replace(noisy, fingerprint="a"), config(epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="was trained on other y than are given now"):
        run(replace(noisy, fingerprint="b"), config(epochs=2), tmp_path / "run")
    run(replace(noisy, fingerprint="a"), config(epochs=2), tmp_path / "run")
    run(replace(noisy, fingerprint="b"), config(epochs=2), tmp_path / "run", resume=False)


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


def test_a_torn_log_line_is_cut_off(noisy: ToyTask, tmp_path: Path) -> None:
    cfg = config(checkpoint_every_steps=2)
    run(noisy, cfg, tmp_path / "whole")
    run(noisy, cfg, tmp_path / "broken", should_stop=StopAfter(5))
    with (tmp_path / "broken" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "lo')
    run(noisy, cfg, tmp_path / "broken")
    same_run(tmp_path / "broken", tmp_path / "whole")


def test_a_log_without_a_checkpoint_starts_over(noisy: ToyTask, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(noisy, config(), tmp_path / "run", should_stop=KillAfter(3))
    run(noisy, config(), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 18


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
