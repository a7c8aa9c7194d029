"""docs/scaling.md against the code: its constants are the code's, its numbers follow its formulas.

A row of its tables is ``| `name` | formula | value | what |``. A formula in backticks is Python over
the names above it and is computed anew; ``code`` is measured here; all other sources (measured,
cited, assumed) are taken as they stand.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raypipe.cluster import datasets, pool, steps, trainer
from raypipe.cluster.pieces import divide
from raypipe.extract import plan
from raypipe.memory import slot, watch
from raypipe.store.commits import Commits, RowTable
from raypipe.store.index import index_bytes
from raypipe.store.journal import CommitRecord, RowSource
from raypipe.store.layout import CellGrid, npy_header
from raypipe.store.manifest import sealed_fields
from raypipe.store.narrow import NarrowingError
from raypipe.store.placed import note_of, write_note
from raypipe.stream import StreamPlan, split_rows
from raypipe.train import TrainConfig

DOC = Path(__file__).parents[1] / "docs" / "scaling.md"
BATCH, ROWS = 16, 16_000
_UNITS = {
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "PB": 1e15,
    "ms": 1e-3,
    "us": 1e-6,
    "ns": 1e-9,
}


def _grid(rows: int) -> CellGrid:
    return CellGrid(rows=rows, grid=BATCH, row_bytes=1, data_offset=128)


def _record_bytes() -> int:
    """One batch of 16, in the middle of a million rows."""
    sources = tuple(RowSource("0123456789abcdef" * 2, 100_000) for _ in range(BATCH))
    record = CommitRecord(
        lo=500_000, hi=500_016, checksum="0" * 16, attempt=1, epoch=1, batch=BATCH,
        writer="1234567-0123456789ab", error=NarrowingError(2**-11, 2**-11, 2**-8),
        sources=sources,
    )  # fmt: skip
    return len(record.to_line())


def _manifest_cell_bytes() -> float:
    def size(rows: int) -> int:
        return len(json.dumps(sealed_fields(Commits(_grid(rows)), "float16", b""), indent=1))

    return (size(2 * ROWS) - size(ROWS)) / (ROWS // BATCH)


def _index_row_bytes() -> float:
    rng = np.random.default_rng(0)
    digests = [rng.bytes(16).hex().encode() for _ in range(ROWS)]
    table = RowTable(np.array(digests, "S64"), rng.integers(90_000, 110_000, ROWS), {})
    return len(index_bytes([f"image-{i:09d}.jpg" for i in range(ROWS)], table)) / ROWS


def _note_row_bytes() -> float:
    index = pa.table(
        {"name": [f"image-{i:09d}.jpg" for i in range(ROWS)], "valid": np.ones(ROWS, bool)}
    )
    store: Any = SimpleNamespace(index=index, manifest={}, fingerprint="f" * 64)
    with TemporaryDirectory() as folder:
        at = Path(folder) / "train.npy"
        write_note(store, at)
        return note_of(at).stat().st_size / ROWS


def _commit_cell_bytes() -> float:
    arrays = [a for a in vars(Commits(_grid(ROWS))).values() if isinstance(a, np.ndarray)]
    return sum(array.nbytes for array in arrays) / (ROWS // BATCH)


def _descriptor_bytes() -> float:
    table = steps.step_table(StreamPlan(range(10**9), 0, BATCH * 1000, 1), 0, 1000, 0, 64)
    return table.nbytes / 64


def _plan_split_bytes() -> float:
    left, _ = split_rows(10**9, 10**8, 0)
    return len(pickle.dumps(StreamPlan(left, 0, BATCH * 1000, 15)))


def _far_rows() -> float:
    """Of a reader of 962 tokens, of two thousand that share object stores of 30 GB."""
    share = divide(30 * 10**9, 2000, 962 * 768 * 2, BATCH)
    return share.pieces * share.piece_rows


CODE: dict[str, Callable[[], float]] = {
    "item_bytes": lambda: plan.ITEM_BYTES,
    "items_a_worker": lambda: plan.MIN_ITEMS_PER_WORKER,
    "header_bytes": lambda: len(npy_header("float16", (10**9, 962, 768))),
    "record_bytes": _record_bytes,
    "manifest_cell_bytes": _manifest_cell_bytes,
    "index_row_bytes": _index_row_bytes,
    "note_row_bytes": _note_row_bytes,
    "commit_cell_bytes": _commit_cell_bytes,
    "descriptor_bytes": _descriptor_bytes,
    "plan_split_bytes": _plan_split_bytes,
    "block_steps": lambda: datasets.MAX_STEPS_PER_BLOCK,
    "slot_bytes": lambda: slot._SIZE,
    "poll_s": lambda: watch.POLL_S,
    "far_rows": _far_rows,
    "group_poll_s": lambda: trainer.look_s(1000),
    "checkpoint_every_s": lambda: TrainConfig().checkpoint_every_s,
    "item_attempts": lambda: pool.MAX_ATTEMPTS,
    "group_restarts": lambda: trainer.MAX_FAILURES + TrainConfig().batch_size.bit_length(),
}


def _number(text: str) -> float:
    found = re.match(r"([\d.,]+(?:e-?\d+)?) ?([a-zA-Z]*)", text)
    assert found, f"{text!r} begins with no number"
    return float(found[1].replace(",", "")) * _UNITS.get(found[2], 1.0)


def _rows() -> list[tuple[str, str, str]]:
    cells = [
        [cell.strip() for cell in line.strip()[1:-1].split("|")]
        for line in DOC.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    return [(c[0].strip("`"), c[1], c[2]) for c in cells if len(c) == 4]


def test_every_number_follows_from_its_formula() -> None:
    names: dict[str, float] = {}
    wrong = []
    for name, formula, value in _rows():
        assert name not in names, f"{name} is given twice"
        names[name] = _number(value)
        if formula.startswith("`"):
            found = eval(formula.strip("`"), {"__builtins__": {}, "min": min}, names)
            if names[name] != pytest.approx(found, rel=0.01):
                wrong.append(f"{name}: {value}, its formula gives {found:.4g}")
            names[name] = found
    assert not wrong, "\n".join(wrong)
    assert len(names) > 50


def test_the_code_s_constants_are_the_code_s() -> None:
    stated = {name: _number(value) for name, formula, value in _rows() if formula == "code"}
    assert stated == pytest.approx({name: measure() for name, measure in CODE.items()}, rel=0.02)
