"""What memory mapping saves: scripts as people write them against raypipe, at several sizes.

Extraction: a list of features, np.concatenate, np.save, against `raypipe extract --runner local`.
Training: np.load of all features into a DataLoader, against raypipe's training loop on the store.
Same images, same backbone (random weights, the layer that makes rows large), same small readout.
Each runs in a process of its own, whose RssAnon (what the kernel cannot take back) is sampled every
5 ms from outside; all of it counts, Python and torch too.

Keys, for extraction and, with train_ before them, for training, at N images:
naive_peak_mib_N, ours_peak_mib_N, saved_percent_N; ours_growth_percent and naive_growth_percent:
from the smallest N to the largest. With --json FILE a plot lands beside it (.png).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import emit, parser, say
from torch import Tensor, nn

from raypipe.backbone import resolve
from raypipe.backbone.model import load
from raypipe.memory import anon_bytes
from raypipe.read import list_images, read_image
from raypipe.runner import LocalRunner
from raypipe.stream import ArraySource
from raypipe.train import TrainConfig

SIZES = (250, 500, 1000, 2000)
BACKBONE, LAYER, SIDE = "timm:resnet18", "layer1", 224  # 3136 x 64: 784 KiB a row in float32
BATCH, OUT = 16, 32
SAMPLE_EVERY_S = 0.005


def naive_extract(images: Path, out: Path) -> None:
    """The script of many a repository: everything in a list, joined, saved."""
    spec = resolve(BACKBONE, layers=(LAYER,))
    model = load(spec, weights="random:0")
    paths, features = list_images(images), []
    for lo in range(0, len(paths), BATCH):
        pixels = [spec.preprocess.host(read_image(path).pixels) for path in paths[lo : lo + BATCH]]
        (tokens,) = model.forward(torch.from_numpy(np.stack(pixels))).values()
        features.append(tokens.numpy())
    np.save(out, np.concatenate(features))


def naive_train(features: Path, responses: Path) -> None:
    """The script of many a repository: everything loaded, then a DataLoader over it."""
    data = torch.utils.data.TensorDataset(
        torch.from_numpy(np.load(features)), torch.from_numpy(np.load(responses))
    )
    model = Readout(data.tensors[0].shape[-1])
    optimiser = torch.optim.AdamW(model.parameters())
    for tokens, wanted in torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True):
        optimiser.zero_grad()
        (model(tokens) - wanted).square().mean().backward()
        optimiser.step()


def our_train(features: Path, responses: Path) -> None:
    """raypipe's loop on the store, one epoch as the other."""
    sources = {"tokens": ArraySource.npy(features), "y": ArraySource.npy(responses)}
    cfg = TrainConfig(epochs=1, batch_size=BATCH, lr=1e-3, schedule="constant", clip_norm=None)
    with tempfile.TemporaryDirectory() as run_dir:
        LocalRunner().fit(ReadoutTask(sources), cfg, Path(run_dir), device="cpu")


class Readout(nn.Module):
    """Tokens (b, T, D) of any float type -> (b, OUT): a layer, their mean, a layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(dim, dim), nn.Linear(dim, OUT)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(nn.functional.gelu(self.hidden(tokens.float())).mean(1))


@dataclass(frozen=True)
class ReadoutTask:
    """``raypipe.train.Task``: responses (OUT,) from tokens; the last tenth of the rows validates."""

    files: Mapping[str, ArraySource]

    @property
    def train_rows(self) -> np.ndarray:
        return np.arange(self._split, dtype=np.int64)

    @property
    def val_rows(self) -> np.ndarray:
        return np.arange(self._split, self.files["y"].n_rows, dtype=np.int64)

    @property
    def _split(self) -> int:
        return self.files["y"].n_rows * 9 // 10

    def build_model(self) -> nn.Module:
        return Readout(self.files["tokens"].shape[-1])

    def sources(self) -> Mapping[str, ArraySource]:
        return self.files

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["tokens"]) - batch["y"]).square().mean(1)

    def val_sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        loss = self.loss(model, batch).double()
        return {"loss": loss.sum(), "n": torch.full_like(loss, 1).sum()}

    def val_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"val_loss": float(sums["loss"] / sums["n"])}

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return []


CHILDREN: dict[str, Callable[[Path, Path], None]] = {
    "naive_extract": naive_extract,
    "naive_train": naive_train,
    "our_train": our_train,
}


def peak_mib(command: Sequence[str]) -> float:
    """Largest RssAnon of ``command``'s process, MiB; ends the benchmark when it fails."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        peak = 0
        while child.poll() is None:
            with suppress(ProcessLookupError):  # it ended just now
                peak = max(peak, anon_bytes(child.pid))
            time.sleep(SAMPLE_EVERY_S)
        if child.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}\n{log.read().decode()}")
    return peak / 2**20


def _child(name: str, *paths: Path) -> list[str]:
    return [sys.executable, __file__, "--child", name, *map(str, paths)]


def _our_extract(images: Path, out: Path) -> list[str]:
    flags = {
        "--data-dir": images,
        "--output-dir": out,
        "--backbone": BACKBONE,
        "--layer": LAYER,
        "--weights": "random:0",
        "--batch-size": BATCH,
        "--device": "cpu",
        "--runner": "local",
    }
    words = [str(word) for flag in flags.items() for word in flag]
    return [sys.executable, "-m", "raypipe", "extract", *words]


def measure(images: Path, root: Path, n: int) -> dict[str, float]:
    """Peaks in MiB over ``n`` images: naive, ours, train_naive, train_ours."""
    saved, out, responses = root / "features.npy", root / "store", root / "responses.npy"
    np.save(responses, np.random.default_rng(0).standard_normal((n, OUT), np.float32))
    peaks = {
        "naive": peak_mib(_child("naive_extract", images, saved)),
        "ours": peak_mib(_our_extract(images, out)),
    }
    (store,) = out.rglob("train.npy")
    peaks["train_naive"] = peak_mib(_child("naive_train", saved, responses))
    peaks["train_ours"] = peak_mib(_child("our_train", store, responses))
    saved.unlink()
    shutil.rmtree(out)
    return peaks


def summarise(peaks: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The keys that the module names, from peaks by number of images."""
    metrics = {}
    small, large = min(peaks), max(peaks)
    for kind in ("", "train_"):
        naive, ours = ({n: of[f"{kind}{who}"] for n, of in peaks.items()} for who in _WHO)
        for n in peaks:
            metrics[f"{kind}naive_peak_mib_{n}"] = round(naive[n], 1)
            metrics[f"{kind}ours_peak_mib_{n}"] = round(ours[n], 1)
            metrics[f"{kind}saved_percent_{n}"] = round(100 * (1 - ours[n] / naive[n]), 1)
        for who, figures in zip(_WHO, (naive, ours), strict=True):
            growth = 100 * (figures[large] / figures[small] - 1)
            metrics[f"{kind}{who}_growth_percent"] = round(growth, 1)
    return metrics


_WHO = ("naive", "ours")


def plot(peaks: Mapping[int, Mapping[str, float]], file: Path) -> None:
    """Both curves, for extraction and for training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, kind, title in zip(axes, ("", "train_"), ("extraction", "training"), strict=True):
        for who, label in zip(_WHO, ("naive script", "raypipe"), strict=True):
            figures = [of[f"{kind}{who}"] / 1024 for of in peaks.values()]
            axis.plot(list(peaks), figures, marker="o", label=label)
        axis.set(title=title, xlabel="images", ylim=(0, None))
    axes[0].set_ylabel("peak of the process, GiB (RssAnon)")
    axes[0].legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](*map(Path, sys.argv[3:]))
        return
    from extract import make_images  # here: the children are measured, and it loads Ray

    args = parser(__doc__)
    args.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of images")
    options = args.parse_args()
    peaks = {}
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        for n in options.sizes:
            peaks[n] = measure(make_images(root / f"images-{n}", n, SIDE), root, n)
            say(f"{n} images, MiB: " + ", ".join(f"{k} {v:.0f}" for k, v in peaks[n].items()))
    if options.json is not None:
        plot(peaks, options.json.with_suffix(".png"))
    emit("savings", {**summarise(peaks), "backbone": BACKBONE, "layer": LAYER}, options.json)


if __name__ == "__main__":
    main()
