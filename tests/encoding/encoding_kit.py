"""Small planted data and features for the encoding tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raypipe.encoding import FitConfig, ModelConfig, PlantedConfig, assess, run
from raypipe.extract import run as extract_run
from raypipe.store import RowSource, ShardSpec, ShardWriter, discard_store, open_for_writing
from raypipe.train import TrainConfig

PLANTED = PlantedConfig(n_train=40, n_test=9, vertices_per_hemi=70, seed=3)
FEATURE = "toy_last"
GRID = 5  # patches a side
LAYOUT = {"n_prefix": 1, "grid": [GRID, GRID]}
TRAIN = TrainConfig(epochs=3, batch_size=8, lr=3e-3, schedule="constant", clip_norm=1.0)


@dataclass(frozen=True)
class World:
    """Where the small dataset and its features are."""

    data: Path
    features: Path

    def copy(self, to: Path) -> World:
        """The same files elsewhere, for a test that changes them."""
        return World(
            Path(shutil.copytree(self.data, to / "data")),
            Path(shutil.copytree(self.features, to / "features")),
        )


def fit_config(world: World, run_dir: Path, **changes: Any) -> FitConfig:
    """Three epochs of a small encoder on subject 01."""
    fields = {
        "data_dir": world.data,
        "features_dir": world.features,
        "feature": FEATURE,
        "run_dir": run_dir,
        "subj": ("01",),
        "encoder": ModelConfig(d_model=16, heads=2, ffn=16, dropout=0.0),
        "train": TRAIN,
        "device": "cpu",
        **changes,
    }
    return FitConfig(**fields)


def tokens_of(path: Path) -> np.ndarray:
    """(1 + 25, 4): colour and edge energy of 5x5 cells, the whole image's mean as CLS."""
    cells = np.asarray(Image.open(path).reduce(5), np.float32) / 255
    grey = cells.mean(2)
    energy = np.hypot(*np.gradient(grey))[..., None]
    maps = np.concatenate([cells, energy * 10], 2).reshape(GRID, 17, GRID, 17, 4).mean((1, 3))
    patches = maps.reshape(-1, 4)
    return np.concatenate([patches.mean(0, keepdims=True), patches])


def write_store(
    path: Path,
    rows: np.ndarray,
    names: list[str],
    *,
    dtype: str = "float32",
    bad: tuple[int, ...] = (),
    layout: dict[str, object] | None = None,
    identity: dict[str, object] | None = None,
) -> None:
    """Seal ``rows`` (n, n_tokens, dim) as a store; ``bad`` rows are marked invalid."""
    spec = ShardSpec(
        path=path,
        rows=len(rows),
        row_shape=rows.shape[1:],
        dtype=dtype,
        names=tuple(names),
        grid=8,
        identity=identity or {"arch": "toy", "weights": "random:0"},
        token_layout=LAYOUT if layout is None else layout,
    )
    sources = [
        RowSource(f"{i:032x}", i, "truncated" if i in bad else None) for i in range(len(rows))
    ]
    discard_store(path)
    with open_for_writing(spec, run_id="test") as run:
        with ShardWriter(run.target, "w") as out:
            for lo, hi in run.missing():
                out.write(lo, rows[lo:hi], sources[lo:hi])
            run.accept(out.commit())
        run.seal()


def extract_toy(data: Path, features: Path, bad: tuple[int, ...] = ()) -> None:
    """Features of every subject and split."""
    splits = {"train": "training_split/training_images", "synt": "test_split/test_images"}
    for subject in sorted(data.glob("subj*")):
        for shard, folder in splits.items():
            images = sorted((subject / folder).iterdir())
            rows = np.stack([tokens_of(image) for image in images])
            path = features / FEATURE / subject.name[4:] / f"{shard}.npy"
            write_store(path, rows, [image.name for image in images], bad=bad)


@contextmanager
def pageless() -> Iterator[None]:
    """Drawing a run's page takes longer than a small run."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (extract_run, run, assess):
            patched.setattr(module, "build_report", lambda run_dir: run_dir / "report.html")
        yield
