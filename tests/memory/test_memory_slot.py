"""A slot is one file that two processes see at once."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from raypipe.memory.slot import Sentence, Slot

OTHER_SIDE = """
import pickle, sys
slot = pickle.loads(bytes.fromhex(sys.argv[1]))
assert slot.pressure and slot.sentence is None
slot.batch, slot.pinned_bytes, slot.phase = 8, 5 << 40, "fit"
"""


def test_both_sides_see_it_at_once(tmp_path: Path) -> None:
    slot = Slot.create(tmp_path / "slot")
    slot.batch, slot.pressure = 64, True
    command = [sys.executable, "-c", OTHER_SIDE, pickle.dumps(slot).hex()]
    subprocess.run(command, check=True, timeout=60)
    assert (slot.batch, slot.largest_batch, slot.pinned_bytes) == (8, 64, 5 << 40)
    assert slot.phase == "fit"


def test_it_outlives_its_writers(tmp_path: Path) -> None:
    slot = Slot.create(tmp_path / "slot")
    assert (slot.pressure, slot.batch, slot.sentence, slot.phase) == (False, None, None, "")
    slot.sentence = Sentence(1, 2, 3, 4, 5)
    slot.beat()
    slot.reliefs += 1
    slot.close()
    later = Slot(tmp_path / "slot")
    assert (later.sentence, later.beats, later.reliefs) == (Sentence(1, 2, 3, 4, 5), 1, 1)
    assert Slot.create(tmp_path / "slot").sentence is None, "made again, it is all zero"
    later.close()


def test_a_long_phase_is_cut(tmp_path: Path) -> None:
    slot = Slot.create(tmp_path / "slot")
    slot.phase = "é" * 100
    slot.batch = 3
    assert slot.phase.startswith("é" * 31)
    assert slot.batch == 3


def test_a_slot_that_nobody_made_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Slot(tmp_path / "none")
