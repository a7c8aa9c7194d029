"""The loader for plain PyTorch: the plan's order, each row once, resumed anywhere, in DataLoader."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tracemalloc
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from raypipe.errors import ConfigError
from raypipe.store import FeatureStore, RowSource, ShardSpec, ShardWriter, open_for_writing
from raypipe.stream import ArraySource, FeatureDataset, FeatureLoader, StreamPlan

N = 97
shared = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """x (97, 4) float16 and id (97,) int64: the row's own number."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((N, 4)).astype("float16"))
    np.save(tmp_path / "id.npy", np.arange(N))
    return {"x": tmp_path / "x.npy", "id": tmp_path / "id.npy"}


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


@given(
    n=st.integers(1, N),
    batch=st.integers(1, 30),
    world=st.integers(1, 4),
    window=st.integers(0, 100),
    seed=st.integers(0, 2**40),
)
@shared
def test_its_order_is_the_plans_and_its_values_are_plain_indexing(
    sources: dict[str, Path], n: int, batch: int, world: int, window: int, seed: int
) -> None:
    rows = range(N - n, N)
    x = np.load(sources["x"])
    plan = StreamPlan(rows, seed, batch * world, 2, window)
    options: dict[str, Any] = {"seed": seed, "window": window, "world": world, "rows": rows}
    for rank in range(world):
        loader = FeatureLoader(sources, batch, rank=rank, **options)
        expected = list(plan.slices(rank, world))
        for epoch in range(2):
            assert (loader.epoch, len(loader)) == (epoch, plan.steps_per_epoch)
            for step, given_ in enumerate(loader):
                part = expected[epoch * plan.steps_per_epoch + step]
                assert given_["id"].tolist() == part.rows.tolist()
                assert np.array_equal(given_["x"].numpy(), x[part.rows])
                assert loader.global_rows == part.global_rows
            assert step == plan.steps_per_epoch - 1
        loader.close()


@given(
    n=st.integers(1, N),
    batches=st.tuples(st.integers(1, 25), st.integers(1, 25), st.integers(1, 25)),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    window=st.integers(0, 60),
    shuffle=st.booleans(),
    data=st.data(),
)
@shared
def test_resuming_twice_with_other_worlds_and_batches_gives_each_row_once(
    sources: dict[str, Path],
    n: int,
    batches: tuple[int, int, int],
    worlds: tuple[int, int, int],
    window: int,
    shuffle: bool,
    data: st.DataObject,
) -> None:
    options: dict[str, Any] = {"rows": range(n), "shuffle": shuffle, "seed": 3}
    options["window"] = window if shuffle else 0
    seen: dict[int, list[int]] = {0: [], 1: []}
    state = None
    for leg, (batch, world) in enumerate(zip(batches, worlds, strict=True)):
        loaders = [
            FeatureLoader(sources, batch, rank=r, world=world, **options) for r in range(world)
        ]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(json.loads(json.dumps(state)))
        epoch, left = loaders[0].epoch, len(loaders[0])
        if epoch > 1:
            break
        take = left if leg == 2 else data.draw(st.integers(0, left))
        running = [iter(loader) for loader in loaders]
        for _ in range(take):
            for one in running:
                seen[epoch].extend(next(one)["id"].tolist())
        states = [loader.state_dict() for loader in loaders]
        assert all(one == states[0] for one in states)
        state = states[0]
        for loader in loaders:
            loader.close()
    epoch = state["epoch"] if state else 0
    for whole in range(min(epoch, 2)):
        assert sorted(seen[whole]) == list(range(n))
    if epoch < 2:
        assert len(set(seen[epoch])) == len(seen[epoch]) == state["position"]


def test_a_batch_that_is_held_is_never_overwritten(sources: dict[str, Path]) -> None:
    loader = FeatureLoader(sources, 8)
    kept = list(loader) + list(loader)  # over two epochs
    x = np.load(sources["x"])
    assert all(np.array_equal(b["x"].numpy(), x[b["id"].numpy()]) for b in kept)
    assert sorted(i for batch in kept for i in batch["id"].tolist()) == sorted([*range(N)] * 2)


def test_batches_that_are_let_go_are_reused(sources: dict[str, Path]) -> None:
    loader = FeatureLoader(sources, 4)
    places = {batch["x"].data_ptr() for _ in range(3) for batch in loader}
    assert len(places) <= 8  # small batches: a deeper ring


def test_epochs_count_up_and_breaking_off_starts_the_epoch_anew(sources: dict[str, Path]) -> None:
    loader = FeatureLoader(sources, 10, epochs=2)
    first = ids(loader)
    for _ in loader:
        break
    second = ids(loader)
    assert first != second
    with pytest.raises(ConfigError, match="all 2 epochs"):
        iter(loader)
    loader.set_epoch(0)
    assert ids(loader) == first
    loader.set_epoch(0)
    assert [b["id"].tolist() for _, b in zip(range(len(loader)), loader)] == first  # noqa: B905
    assert ids(loader) == second  # the end of the first was not asked for, yet it was over
    with pytest.raises(ConfigError, match="epoch 2"):
        loader.set_epoch(2)
    older = iter(FeatureLoader(sources, 10))
    next(older)
    loader.set_epoch(1)
    one = iter(loader)
    next(one)
    assert ids(loader) == second
    assert list(one) == []


def test_order_last_batch_and_empty_ranks(sources: dict[str, Path]) -> None:
    assert ids(FeatureLoader(sources, 40, shuffle=False))[2] == list(range(80, N))
    dropping = FeatureLoader(sources, 40, shuffle=False, drop_last=True)
    assert len(dropping) == len(ids(dropping)) == 2
    small = [FeatureLoader(sources, 2, rows=[5, 9, 7], rank=r, world=2) for r in range(2)]
    assert [len(loader) for loader in small] == [1, 1]
    ends = [FeatureLoader(sources, 2, rows=range(5), rank=r, world=2) for r in range(2)]
    sizes = [[(len(b["id"]), loader.global_rows) for b in loader] for loader in ends]
    assert sizes == [[(2, 4), (1, 1)], [(2, 4), (0, 1)]]


def test_a_mean_by_global_rows_is_the_mean_of_all_rows(sources: dict[str, Path]) -> None:
    world, total = 3, 0.0
    for rank in range(world):
        loader = FeatureLoader(sources, 40, rank=rank, world=world)
        total += sum(float(b["id"].sum()) / loader.global_rows for b in loader)
    assert total == pytest.approx(np.arange(N).mean())


def test_casts_joins_and_stores(sources: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.ones((N, 3), np.float32))
    join = {"features": (("x", "y"), 1)}
    loader = FeatureLoader({**sources, "y": tmp_path / "y.npy"}, 8, dtype="bfloat16", join=join)
    x = torch.from_numpy(np.load(sources["x"])).bfloat16()
    for batch in loader:
        assert batch["features"].shape[1:] == (7,)
        assert torch.equal(batch["features"][:, :4], x[batch["id"]])
        assert (batch["features"][:, 4:] == 1).all()


def test_a_sealed_store_is_read_as_what_it_is_without_its_invalid_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    values = torch.randn(6, 4)
    names = tuple(f"{i}.png" for i in range(6))
    spec = ShardSpec(
        path=path, rows=6, row_shape=(4,), dtype="bfloat16", names=names, grid=6, identity={}
    )
    origins = [RowSource(f"{i:032x}", i, "truncated" if i == 3 else None) for i in range(6)]
    with open_for_writing(spec, run_id="test") as run:
        with ShardWriter(run.target, "w") as out:
            out.write(0, values.numpy(), origins)
            run.accept(out.commit())
        run.seal()
    for given_ in (path, FeatureStore.open(path)):
        loader = FeatureLoader({"x": given_}, 6, shuffle=False)
        (batch,) = loader
        assert torch.equal(batch["x"], values[[0, 1, 2, 4, 5]].bfloat16())
        assert loader.state_dict()["sources"]["x"] == FeatureStore.open(path).fingerprint


def test_wrong_arguments_and_states_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.arange(5))
    short = {**sources, "short": tmp_path / "short.npy"}
    for options, says in [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"shuffle": False, "window": 3}, "without shuffle"),
        ({"rows": [1, N]}, f"row {N} asked of x"),
        ({"epochs": 0}, "epochs=0"),
        ({"sources": short}, "short 5 rows"),
        ({"dtype": "float8"}, "float8"),
    ]:
        with pytest.raises(ConfigError, match=says):
            FeatureLoader(**{"sources": sources, "batch_size": 4, **options})
    assert len(FeatureLoader(short, 2, rows=range(5))) == 3
    state = FeatureLoader(sources, 4).state_dict()
    for options in ({"seed": 1}, {"rows": range(9)}, {"window": 9}, {"shuffle": False}):
        with pytest.raises(ConfigError, match="another run"):
            FeatureLoader(sources, 4, **options).load_state_dict(state)


def test_a_resumed_epoch_survives_set_epoch(sources: dict[str, Path]) -> None:
    loader = FeatureLoader(sources, 10)
    whole = ids(loader)
    loader.set_epoch(0)
    for count, _ in enumerate(loader):
        if count == 3:
            break
    resumed = FeatureLoader(sources, 10)
    resumed.load_state_dict(loader.state_dict())
    for epoch in range(resumed.epoch, 2):
        resumed.set_epoch(epoch)
        assert len(resumed) == (6 if epoch == 0 else 10)
        found = ids(resumed)
        assert found == whole[4:] if epoch == 0 else sorted(chain(*found)) == list(range(N))


def test_a_pickled_loader_goes_on_where_it_was(sources: dict[str, Path]) -> None:
    loader = FeatureLoader(sources, 10)
    list(loader)
    assert ids(pickle.loads(pickle.dumps(loader))) == ids(loader)


def test_it_drops_into_a_dataloader(sources: dict[str, Path]) -> None:
    plain = FeatureLoader(sources, 8, seed=2, window=32)
    dataset = FeatureDataset(sources, 8, seed=2, window=32)
    loader = DataLoader(dataset, batch_size=None)
    assert len(loader) == len(plain)
    for _ in range(2):
        assert ids(loader) == ids(plain)
    for count, batch in enumerate(loader):
        assert dataset.global_rows == len(batch["id"])
        if count == 4:
            break
    resumed = FeatureDataset(sources, 4, seed=2, window=32)
    resumed.load_state_dict(dataset.state_dict())
    plain.set_epoch(2)
    assert list(chain(*ids(DataLoader(resumed, batch_size=None)))) == list(chain(*ids(plain)))[40:]


def test_worker_processes_keep_the_order(sources: dict[str, Path]) -> None:
    dataset = FeatureDataset(sources, 8, seed=2)
    plain = FeatureLoader(sources, 8, seed=2)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert ids(loader) == ids(plain)
    with pytest.raises(ConfigError, match="num_workers=0"):
        dataset.state_dict()


def test_ten_million_rows_start_at_once_and_small(tmp_path: Path) -> None:
    path = tmp_path / "big.npy"
    np.lib.format.open_memmap(path, "w+", np.float16, (10_000_000, 768)).flush()  # sparse
    list(FeatureLoader({"x": ArraySource.npy(path)}, 2, rows=range(2)))  # torch's own first times
    tracemalloc.start()
    loader = FeatureLoader({"x": path}, 256, seed=1)
    batch = next(iter(loader))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch["x"].shape == (256, 768)
    assert peak_bytes < 8_000_000


def test_it_is_found_in_the_package_and_brings_no_ray() -> None:
    code = (
        "import sys\nfrom raypipe.stream import FeatureDataset, FeatureLoader\n"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    import raypipe.stream

    with pytest.raises(AttributeError, match="nothing"):
        raypipe.stream.nothing  # noqa: B018
