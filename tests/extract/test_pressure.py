"""The worker under a memory budget: when it halves, what it says of it, what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from raypipe.errors import MemoryBudgetExceeded
from raypipe.extract import worker as worker_module
from raypipe.extract.config import ExtractConfig
from raypipe.extract.plan import RangeItem
from raypipe.extract.run import extract
from raypipe.extract.worker import ExtractWorker
from raypipe.memory.guard import current, guarding
from raypipe.runner import Done, LocalRunner
from raypipe.store import FeatureStore, verify

pytestmark = pytest.mark.usefixtures("no_page")
MakeConfig = Callable[..., ExtractConfig]


class Scripted:
    """A guard that says what a test wants to hear; the last answer stays."""

    budget_bytes = 2**30

    def __init__(self, answers: Iterable[bool]) -> None:
        self._answers, self._last = iter(answers), False
        self.asked = 0
        self.batches: list[int] = []

    def pressure(self) -> bool:
        self.asked += 1
        self._last = next(self._answers, self._last)
        return self._last

    def note(self, *, batch: int | None = None, phase: str | None = None) -> None:
        if batch is not None:
            self.batches.append(batch)


@pytest.fixture
def under(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scripted], None]:
    """Puts the worker, wherever its pool put it, under a guard of the test's."""

    def put(guard: Scripted) -> None:
        def note(*, batch: int | None = None, phase: str | None = None, **_: object) -> None:
            guard.note(batch=batch, phase=phase)

        monkeypatch.setattr(worker_module, "current", lambda: guard)
        monkeypatch.setattr(worker_module, "note", note)

    return put


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward pass, as they come."""
    seen: list[int] = []
    forward = ExtractWorker._forward_batch

    def counted(self: ExtractWorker, pixels: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(ExtractWorker, "_forward_batch", counted)
    return seen


def store_of(cfg: ExtractConfig) -> FeatureStore:
    return FeatureStore.open(cfg.output_dir / "resnet18_layer4" / cfg.data_dir.name / "train.npy")


def test_pressure_halves_at_the_next_boundary_and_stays_halved(
    config: MakeConfig, under: Callable[[Scripted], None], sizes: list[int]
) -> None:
    guard = Scripted([False] * 3 + [True, False])
    under(guard)
    summary = extract(config(image_size=64, batch_size=8), LocalRunner())
    assert sizes == [8, 8, 8, 4, 4, 4, 4, 4, 4], "asked before each pass, never grown again"
    assert guard.batches == sizes
    assert guard.asked == len(sizes)
    assert {entry.rpartition(" ")[2] for entry in summary.halved} == {"4"}


def test_the_store_says_which_rows_were_computed_with_a_smaller_batch(
    config: MakeConfig, under: Callable[[Scripted], None]
) -> None:
    whole = config(image_size=64, batch_size=8)
    extract(whole, LocalRunner())
    under(Scripted([False] * 3 + [True, False]))
    cfg = config(image_size=64, batch_size=8, output_dir=whole.output_dir.with_name("short"))
    extract(cfg, LocalRunner())
    halved, plain = store_of(cfg), store_of(whole)
    assert not plain.manifest["halved"]
    assert halved.manifest["halved"] == [[24, 48, 4]], "[lo, hi, batch]"
    np.testing.assert_array_equal(halved[:24], plain[:24])
    np.testing.assert_allclose(
        np.asarray(halved.array, np.float32),
        np.asarray(plain.array, np.float32),
        rtol=2e-3,
        atol=1e-3,
    )
    assert verify(halved.path).ok


def test_pressure_within_a_cell_is_marked_by_the_smallest_batch(
    config: MakeConfig, under: Callable[[Scripted], None], sizes: list[int]
) -> None:
    under(Scripted([True, False, False, True, False]))
    cfg = config(image_size=64, batch_size=48)
    extract(cfg, LocalRunner())
    smallest = min(sizes)
    assert sizes[0] == 24
    assert sum(sizes) == 48
    assert store_of(cfg).manifest["halved"] == [[0, 48, smallest]]


def test_pressure_that_lasts_ends_at_one_image_and_the_work_is_done(
    config: MakeConfig, under: Callable[[Scripted], None], sizes: list[int]
) -> None:
    under(Scripted([True]))
    cfg = config(image_size=64)
    extract(cfg, LocalRunner())
    assert sizes[0] == 2
    assert sizes[-1] == 1
    assert sum(sizes) == 48
    assert store_of(cfg).valid.all()


def test_memory_is_given_back_under_pressure_only(
    config: MakeConfig, under: Callable[[Scripted], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(worker_module, "relieve", lambda: calls.append(1))
    under(Scripted([False]))
    extract(config(image_size=64), LocalRunner())
    assert not calls
    under(Scripted([True, True, False]))
    again = config(image_size=64)
    extract(config(image_size=64, output_dir=again.output_dir.with_name("b")), LocalRunner())
    assert 1 <= len(calls) <= 2


def test_an_exhausted_budget_stops_the_run_and_it_resumes(
    config: MakeConfig, under: Callable[[Scripted], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spent(Scripted):
        def pressure(self) -> bool:
            if super().pressure() or self.asked > 5:
                raise MemoryBudgetExceeded("budget 1.00 GiB, usage 1.10 GiB; --batch-size")
            return False

    cfg, spent = config(image_size=64), Spent([])
    with monkeypatch.context() as patched:
        patched.setattr(worker_module, "current", lambda: spent)
        with pytest.raises(MemoryBudgetExceeded, match=r"budget 1\.00 GiB"):
            extract(cfg, LocalRunner())
    extract(cfg, LocalRunner())
    assert verify(store_of(cfg).path).ok


def test_a_limited_item_limits_those_after_it(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    """What killed a worker at its full batch once would do so at each following item."""
    step = ExtractWorker.step

    def limited(self: ExtractWorker, item: RangeItem, upcoming: RangeItem | None) -> list[Done]:
        return step(self, item.with_less_memory() if item.lo == 12 else item, upcoming)

    monkeypatch.setattr(ExtractWorker, "step", limited)
    extract(config(image_size=64), LocalRunner())
    assert set(sizes[:3]) == {4}
    assert set(sizes[3:]) == {2}


def test_the_guard_of_the_process_is_the_one_asked(config: MakeConfig) -> None:
    guard = Scripted([False])
    with guarding(guard):
        assert current() is guard


def test_at_most_takes_the_smaller_limit() -> None:
    free, two, eight = (RangeItem("g", 0, 16, 16, (), batch_limit=n) for n in (None, 2, 8))
    assert free.at_most(free).batch_limit is None
    assert free.at_most(two).batch_limit == 2
    assert two.at_most(eight).batch_limit == 2
    assert eight.at_most(two).batch_limit == 2
    assert eight.at_most(free).batch_limit == 8
