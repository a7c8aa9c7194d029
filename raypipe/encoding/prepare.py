"""One subject made ready to fit: data opened and checked, rows divided, task built; nothing written.

What a run will take on disk and in memory is known here, before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypipe import config as configs
from raypipe.encoding import data
from raypipe.encoding.config import FitConfig
from raypipe.encoding.readout import HEMIS, build_readout
from raypipe.encoding.task import EncodingTask, token_statistics
from raypipe.units import format_bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """One subject, checked, and nothing written yet."""

    subject: str
    run_dir: Path
    split_data: data.SplitData
    split: data.Split
    task: EncodingTask

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it goes on from."""
        return {
            "subject": self.subject,
            "features": self.split_data.store.fingerprint,
            "encoder": configs.to_dict(self.task.encoder),
            "queries": list(self.task.readout.queries),
        }

    def n_parameters(self) -> int:
        """Trainable numbers, counted without allocating them."""
        import torch

        from raypipe.encoding.model import build_encoder

        with torch.device("meta"):
            model = build_encoder(self.task.encoder, self.task.shape, self.task.readout)
        return sum(p.numel() for p in model.parameters())

    def disk_bytes(self, cfg: FitConfig) -> int:
        """Checkpoints: weights and two AdamW moments for each generation and one being written,
        weights alone for the best and the one that replaces it.
        """
        return 4 * self.n_parameters() * (3 * (cfg.train.keep + 1) + 2)

    def memory_bytes(self, cfg: FitConfig) -> int:
        """A worker's weights, gradients, moments and batches; activations come on top."""
        rows = sum(source.row_bytes for source in self.task.sources().values())
        return 16 * self.n_parameters() + 4 * rows * cfg.train.batch_size

    def describe(self, cfg: FitConfig) -> str:
        """What ``--dry-run`` prints."""
        shape = self.task.shape
        return (
            f"subject {self.subject}: {len(self.split.train)} images to train,"
            f" {len(self.split.val)} to validate; tokens {shape.n_tokens} x {shape.dim};"
            f" {self.n_parameters():,} parameters; disk {format_bytes(self.disk_bytes(cfg))},"
            f" memory of a worker {format_bytes(self.memory_bytes(cfg))} and activations"
        )


def prepare(cfg: FitConfig, subj: str, run_dir: Path) -> Prepared:
    """Open, check and split one subject's data, and build its task; writes nothing."""
    opened = data.open_split(cfg.data_dir, cfg.features_dir, cfg.feature, subj, "train")
    for path in (opened.fmri or {}).values():
        data.check_finite(path)
    split = data.seeded_split(opened.valid, cfg.val_fraction, cfg.split_seed)
    responses = opened.responses()
    readout = build_readout(
        cfg.encoder.readout,
        opened.subject.rois(),
        {hemi: responses[hemi].row_shape[0] for hemi in HEMIS},
    )
    cls = cfg.encoder.model == "linear" and cfg.encoder.linear_pool == "cls"
    statistics = None
    if cfg.encoder.standardise:
        statistics = token_statistics(opened.tokens(), opened.shape, split.train, cls=cls)
    task = EncodingTask(
        tokens=opened.tokens(),
        responses=responses,
        shape=opened.shape,
        encoder=cfg.encoder,
        readout=readout,
        train_rows=split.train,
        val_rows=split.val,
        statistics=statistics,
    )
    return Prepared(subject=subj, run_dir=run_dir, split_data=opened, split=split, task=task)
