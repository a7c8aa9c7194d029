"""Features beside responses: what does not belong together is refused; the task's sums."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding_kit import FEATURE, LAYOUT, PLANTED, World, tokens_of, write_store
from sklearn.feature_selection import r_regression
from sklearn.metrics import mean_squared_error

from raypipe.encoding import data
from raypipe.encoding.config import ModelConfig
from raypipe.encoding.readout import build_readout
from raypipe.encoding.shapes import TokenShape
from raypipe.encoding.split import seeded_split
from raypipe.encoding.task import EncodingTask, token_statistics
from raypipe.errors import (
    InputError,
    MemoryBudgetExceeded,
    MissingInput,
    StoreNotSealed,
    UnknownName,
)
from raypipe.memory.guard import InProcessGuard, guarding
from raypipe.read import AlgonautsSubject
from raypipe.stream import ArraySource


def open_train(world: World, feature: str = FEATURE, subj: str = "01") -> data.SplitData:
    return data.open_split(world.data, data.StoresIn(world.features, feature), subj, "train")


# ---- opening


def test_rows_and_places_fit(world: World) -> None:
    opened = open_train(world)
    assert opened.n_rows == PLANTED.n_train and opened.valid.all()
    assert opened.shape == TokenShape(prefix=1, height=5, width=5, dim=4)
    first = AlgonautsSubject.open(world.data, "01").image_paths("train")[7]
    np.testing.assert_allclose(opened.features.store[7], tokens_of(first), rtol=1e-6)
    assert opened.responses()["lh"].shape == (PLANTED.n_train, PLANTED.vertices_per_hemi)
    assert opened.features.sources()["tokens"].path.is_absolute()


def test_names_that_are_not_there(world: World, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="toy_last"):
        open_train(world, feature="toy_lats")
    with pytest.raises(UnknownName, match="subj03"):
        open_train(world, subj="03")
    with pytest.raises(MissingInput, match="raypipe extract"):
        data.open_split(world.data, data.StoresIn(tmp_path / "none", FEATURE), "01", "train")


def test_an_unfinished_store_is_refused(world: World, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    manifest = changed.features / FEATURE / "01" / "train.manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**fields, "state": "writing"}))
    with pytest.raises(StoreNotSealed):
        open_train(changed)


def test_another_order_of_images_is_refused(world: World, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    images = AlgonautsSubject.open(changed.data, "01").image_paths("train")
    names = [path.name for path in images]
    names[3], names[4] = names[4], names[3]
    rows = np.zeros((len(names), 26, 4), np.float32)
    write_store(changed.features / FEATURE / "01" / "train.npy", rows, names)
    with pytest.raises(InputError, match="row 3 is"):
        open_train(changed)


def test_another_number_of_images_is_refused(world: World, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    images = AlgonautsSubject.open(changed.data, "01").image_paths("train")
    images[-1].unlink()
    with pytest.raises(InputError, match="40 rows in the store, 39 images"):
        open_train(changed)
    shutil.rmtree(images[0].parent)  # responses without images: the count still tells
    assert open_train(changed).n_rows == 40
    for hemi in ("lh", "rh"):
        path = changed.data / f"subj01/training_split/training_fmri/{hemi}_training_fmri.npy"
        np.save(path, np.load(path)[:-1])
    with pytest.raises(InputError, match="holds 39 images"):
        open_train(changed)


def test_withheld_test_responses_are_said_so(world: World, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    shutil.rmtree(changed.data / "subj01/test_split/test_fmri")
    place = (changed.data, data.StoresIn(changed.features, FEATURE), "01", "test")
    with pytest.raises(MissingInput, match="withholds"):
        data.open_split(*place)
    opened = data.open_split(*place, fmri=False)
    with pytest.raises(MissingInput, match="--split val"):
        opened.responses()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_responses_that_are_not_finite_are_found(tmp_path: Path, value: float) -> None:
    array = np.zeros((50, 7), np.float32)
    np.save(tmp_path / "a.npy", array)
    data.checked_digest(tmp_path / "a.npy")
    array[31, 4] = value
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match="image 31, vertex 4"):
        data.checked_digest(tmp_path / "a.npy")


def test_the_digest_is_of_values_shape_and_dtype(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    other = array.copy()
    other[3, 2] += 1
    variants = [array, other, array.reshape(3, 4), array.astype(np.float64)]
    digests = []
    for i, variant in enumerate(variants):
        np.save(tmp_path / f"{i}.npy", variant)
        digests.append(data.checked_digest(tmp_path / f"{i}.npy"))
    assert len(set(digests)) == 4
    np.save(tmp_path / "again.npy", np.asfortranarray(array))
    assert data.checked_digest(tmp_path / "again.npy") == digests[0]


def test_responses_are_read_through_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.random.default_rng(0).standard_normal((4000, 2000)))  # 64 MB
    whole = data.checked_digest(path)
    monkeypatch.setattr(data, "_CHECK_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        assert data.checked_digest(path) == whole
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


# ---- the task


def make_task(world: World, **options: object) -> EncodingTask:
    opened = open_train(world)
    cfg = ModelConfig(d_model=16, heads=2, ffn=16, dropout=0.0, **options)  # type: ignore[arg-type]
    split = seeded_split(opened.valid, 0.2, 0)
    n = {"lh": PLANTED.vertices_per_hemi, "rh": PLANTED.vertices_per_hemi}
    return EncodingTask(
        features=opened.features.sources(),
        responses=opened.responses(),
        shape=opened.shape,
        encoder=cfg,
        readout=build_readout("rois_all", opened.subject.rois(), n),
        train_rows=split.train,
        val_rows=split.val,
        statistics=token_statistics(opened.features.sources(), opened.shape, split.train),
    )


def batch_of(task: EncodingTask, rows: np.ndarray) -> dict[str, torch.Tensor]:
    arrays = {name: np.load(source.path) for name, source in task.sources().items()}
    return {name: torch.from_numpy(array[rows]) for name, array in arrays.items()}


def test_the_task_travels_small(world: World) -> None:
    task = make_task(world)
    sent = pickle.dumps(task)
    assert len(sent) < 60_000
    copy = pickle.loads(sent)
    torch.manual_seed(0)
    first = task.build_model()
    torch.manual_seed(0)
    second = copy.build_model()
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_loss_is_the_two_mean_squared_errors(world: World) -> None:
    task = make_task(world)
    model = task.build_model().eval()
    batch = batch_of(task, task.train_rows[:5])
    loss = task.loss(model, batch)
    predicted = model(batch["tokens"])
    for row in range(5):
        want = sum(
            mean_squared_error(batch[h][row].numpy(), predicted[h][row].detach().numpy())
            for h in ("lh", "rh")
        )
        assert float(loss[row].detach()) == pytest.approx(want, rel=1e-5)


def test_validation_sums_add_up_to_the_whole(world: World) -> None:
    task = make_task(world)
    model = task.build_model().eval()
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for piece in np.array_split(task.val_rows, 3):
            for key, value in task.val_sums(model, batch_of(task, piece)).items():
                sums[key] = sums.get(key, 0) + value
        whole = batch_of(task, task.val_rows)
        predicted = model(whole["tokens"])
        loss = float(task.loss(model, whole).mean())
    metrics = task.val_metrics(sums)
    r = {
        h: [
            r_regression(predicted[h][:, [v]].double().numpy(), whole[h][:, v].double().numpy())[0]
            for v in range(PLANTED.vertices_per_hemi)
        ]
        for h in ("lh", "rh")
    }
    assert metrics["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["val_r_lh"] == pytest.approx(np.mean(r["lh"]), abs=1e-6)
    assert metrics["val_r_rh"] == pytest.approx(np.mean(r["rh"]), abs=1e-6)
    assert metrics["val_r"] == pytest.approx(np.mean(r["lh"] + r["rh"]), abs=1e-6)


def test_checkpoint_blocks(world: World) -> None:
    task = make_task(world, layers=3)
    assert len(task.checkpoint_blocks(task.build_model())) == 3
    linear = make_task(world, model="linear")
    assert len(linear.checkpoint_blocks(linear.build_model())) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cls", [False, True])
def test_statistics_are_numpys(tmp_path: Path, dtype: str, cls: bool) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((21, 26, 4)) * [1, 2, 3, 4] + [0, 5, -5, 0]).astype(np.float32)
    rows[4] = np.nan
    write_store(
        tmp_path / "f" / "01" / "train.npy",
        rows,
        [f"{i}" for i in range(21)],
        dtype=dtype,
        bad=(4,),
    )
    source = ArraySource.npy(
        tmp_path / "f" / "01" / "train.npy", dtype="bfloat16" if dtype == "bfloat16" else None
    )
    shape = TokenShape.of((26, 4), LAYOUT)
    valid = np.delete(np.arange(21), 4)
    got = token_statistics({"tokens": source}, shape, valid, cls=cls)
    part = rows[valid][:, :1] if cls else rows[valid][:, 1:]
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(got.mean, part.mean((0, 1)), atol=10 * tolerance)
    np.testing.assert_allclose(got.std, part.std((0, 1)), rtol=10 * tolerance)


def test_statistics_are_taken_within_the_budget(world: World) -> None:
    opened = open_train(world)
    rows = np.arange(PLANTED.n_train)
    ballast = np.ones(257 << 20, np.uint8)
    with (
        guarding(InProcessGuard(512 << 20, "driver")),  # of which 256 MiB can be used
        pytest.raises(MemoryBudgetExceeded, match="driver holds"),
    ):
        token_statistics(opened.features.sources(), opened.shape, rows)
    assert ballast[-1] == 1
