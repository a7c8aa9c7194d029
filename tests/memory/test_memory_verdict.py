"""A verdict says what a person needs, and is there as a whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raypipe.errors import StoreCorrupt
from raypipe.memory.verdict import Verdict, find, read_all

GIB = 1024**3
VERDICT = Verdict(
    pid=17,
    start_ticks=99,
    host="node-3",
    label="worker-1",
    budget_bytes=2 * GIB,
    stop_bytes=int(1.75 * GIB),
    usage_bytes=int(1.8 * GIB),
    anon_bytes=int(1.7 * GIB),
    pinned_bytes=GIB // 10,
    shm_bytes=0,
    file_bytes=5 * GIB,
    batch=8,
    phase="train",
    tried=("told 3.0 s before to take less", "batch 32 -> 8"),
    unseen_s=0.005,
    when=100.0,
)


def test_it_is_read_back_as_it_was_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "memory"
    path = VERDICT.write(folder)
    assert path.name == "verdict-17-99.json"
    assert list(folder.iterdir()) == [path]
    assert find(folder, 17, 99) == VERDICT
    assert find(folder, 17, 98) is None
    replace(VERDICT, pid=18, when=50.0).write(folder)
    assert [one.pid for one in read_all(folder)] == [18, 17]


def test_its_message_is_one_line_with_all_of_it() -> None:
    text = VERDICT.message()
    assert "\n" not in text
    for part in (
        "worker-1 (process 17 on node-3)", "in train at batch 8", "1.80 GiB of its budget of 2.00",
        "anonymous 1.70 GiB", "pinned 102 MiB", "5.00 GiB of file pages not counted",
        "told 3.0 s before", "batch 32 -> 8", "give a smaller batch",
        "--max-memory-per-process",
    ):  # fmt: skip
        assert part in text


def test_at_batch_1_no_smaller_batch_is_advised() -> None:
    text = replace(VERDICT, batch=1, tried=()).message()
    assert "smaller batch" not in text
    assert "tried: nothing" in text


def test_a_file_that_is_no_verdict_is_named(tmp_path: Path) -> None:
    (tmp_path / "verdict-1-2.json").write_text("{}")
    with pytest.raises(StoreCorrupt, match=r"verdict-1-2\.json is no verdict"):
        read_all(tmp_path)
