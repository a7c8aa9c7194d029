"""One subject made ready to fit: data opened and checked, rows divided, task built; nothing written.

What a run will take on disk and in memory is known here, before it starts. Every byte of the
responses is read, once: they must be finite, and a resumed run must find the same.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raypipe import config as configs
from raypipe.encoding import data
from raypipe.encoding.config import FitConfig
from raypipe.encoding.features import ComputedFeatures
from raypipe.encoding.readout import HEMIS, build_readout
from raypipe.encoding.split import Split, seeded_split
from raypipe.encoding.task import STATISTICS_BATCH, EncodingTask, token_statistics
from raypipe.runner import Runner
from raypipe.store.space import free_bytes
from raypipe.stream import ArraySource
from raypipe.stream.at_hand import far_sources
from raypipe.stream.reading import OpenRows
from raypipe.train import TrainConfig, checkpoint
from raypipe.train.checkpoint import on_disk_bytes
from raypipe.units import format_bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """One subject, checked, and nothing written yet."""

    subject: str
    run_dir: Path
    split_data: data.SplitData
    split: Split
    task: EncodingTask

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it goes on from."""
        return {
            "subject": self.subject,
            **self.split_data.features.fingerprints(),
            **{f"{hemi} responses": self.task.responses[hemi].fingerprint for hemi in HEMIS},
            "encoder": configs.to_dict(self.task.encoder),
            "queries": list(self.task.readout.queries),
            "ROI masks": self.task.readout.digest,
        }

    def feature(self, cfg: FitConfig) -> str:
        """The folder below a root of stores that these features have, or would have."""
        features = self.split_data.features
        return cfg.feature or (features.folder if isinstance(features, ComputedFeatures) else "")

    def n_parameters(self) -> int:
        """Trainable numbers, counted without allocating them."""
        import torch

        from raypipe.encoding.model import build_encoder

        with torch.device("meta"):
            model = build_encoder(self.task.encoder, self.task.shape, self.task.readout)
        return sum(p.numel() for p in model.parameters())

    def disk_bytes(self, cfg: FitConfig) -> int:
        """The most that checkpoints take: float32 weights and two AdamW moments for each generation
        and the one being written, and the best weights.
        """
        return self._generation_bytes() * (cfg.train.keep + 1) + 4 * self.n_parameters()

    def missing_bytes(self, cfg: FitConfig) -> int:
        """What of ``disk_bytes`` must still be free, with the checkpoints that are there.

        A resumed run writes a generation before it drops one; one that starts over drops all first.
        """
        missing = self.disk_bytes(cfg) - on_disk_bytes(self.run_dir)
        return max(missing, self._generation_bytes() if cfg.resume else 0)

    def _generation_bytes(self) -> int:
        return 12 * self.n_parameters()

    def model_bytes(self) -> int:
        """A worker's float32 weights, gradients and two AdamW moments, on its device."""
        return 16 * self.n_parameters()

    def describe(self, cfg: FitConfig) -> str:
        """What ``--dry-run`` prints. Raises MemoryBudgetExceeded when nothing fits --fit-gpu."""
        from raypipe.train.loop import buffer_bytes

        step, train = self._step_lines(cfg)
        shape = self.task.shape
        there = on_disk_bytes(self.run_dir)
        batches = buffer_bytes(self.task.sources(), train.batch_size)
        steps = -(-len(self.split.train) // train.rows_per_step(cfg.workers))
        return "\n".join(
            (
                f"subject {self.subject}: {len(self.split.train)} images to train,"
                f" {len(self.split.val)} to validate; tokens {shape.n_tokens} x {shape.dim};"
                f" {self.n_parameters():,} parameters; {train.epochs} epochs of {steps} steps",
                f"  disk    {format_bytes(self.disk_bytes(cfg))} at most in {self.run_dir}:"
                f" {train.keep} generations of checkpoints, one being written, the best weights"
                + (f"; {format_bytes(there)} of checkpoints are there already" if there else "")
                + ". Not in it: logs, the report",
                f"  memory  each of {cfg.workers} worker(s): {format_bytes(self.model_bytes())} on its"
                f" device for weights, gradients and AdamW moments, {format_bytes(batches)} of the"
                " host's for batches"
                + (", with activations as below" if step else "")
                + f". Not in it: {'' if step else 'activations, '}Python and torch themselves",
                *(f"    {line}" for line in step),
                *self._cost_lines(cfg),
                "  time    not known before the first steps; training then shows it",
            )
        )

    def _cost_lines(self, cfg: FitConfig) -> list[str]:
        """On the fly: what the backbone computes again and again, against a store of its tokens."""
        features = self.split_data.features
        if not isinstance(features, ComputedFeatures):
            return []
        rows, epochs = len(self.split.train) + len(self.split.val), cfg.train.epochs
        bone, free = features.backbone, free_bytes(self.run_dir)
        lines = [
            f"  backbone {bone.spec.name}, frozen, {format_bytes(4 * bone.n_parameters)} of weights in"
            f" each worker: {rows} images an epoch through it, {rows * epochs} in {epochs} epochs; a"
            f" store takes {len(features.names)} and {format_bytes(features.store_bytes)} of disk"
        ]
        if epochs > 1 and free is not None and free > features.store_bytes:
            lines.append(
                f"  warning  a store is cheaper here: {format_bytes(free)} are free, and the"
                f" backbone would compute {epochs} times less. raypipe extract, with the same"
                f" options, then --features-dir and --feature {features.folder}"
            )
        return lines

    def _step_lines(self, cfg: FitConfig) -> tuple[list[str], TrainConfig]:
        """What a step takes on this machine's own device, and the options that would be used."""
        import torch

        from raypipe.train.choose import plan_here

        if cfg.train.fit_gpu_bytes is None and cfg.train.predict_memory is False:
            return [], cfg.train
        if far := far_sources(self.task.sources()):
            lies = f"rows of {', '.join(far)} lie on other nodes' disks"
            return [f"a step is not foretold here: {lies}; the run does it there"], cfg.train
        on_cuda = cfg.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if on_cuda else "cpu")
        found = checkpoint.newest(self.run_dir) if cfg.resume else None
        planned = plan_here(self.task, cfg.train, device, cfg.workers, found)
        return planned.lines, planned.cfg


def prepare(cfg: FitConfig, subj: str, run_dir: Path, runner: Runner | None = None) -> Prepared:
    """Open, check and split one subject's data, and build its task; writes nothing.

    ``runner``: brings rows that lie on other nodes' disks; None: nobody does.
    """
    place = cfg.images if cfg.on_the_fly else _stores(cfg)
    opened = data.open_split(
        cfg.data_dir, place, subj, "train", kept_in=run_dir if cfg.resume else None
    )
    responses = {hemi: _identified(source) for hemi, source in opened.responses().items()}
    split = seeded_split(opened.valid, cfg.val_fraction, cfg.split_seed)
    readout = build_readout(
        cfg.encoder.readout,
        opened.subject.rois(),
        {hemi: responses[hemi].row_shape[0] for hemi in HEMIS},
    )
    cls = cfg.encoder.model == "linear" and cfg.encoder.linear_pool == "cls"
    features = opened.features
    statistics = None
    if cfg.encoder.standardise and not cfg.dry_run:  # on the fly it would take its minutes
        sources = features.sources()
        bring: AbstractContextManager[OpenRows | None] = nullcontext(None)
        if runner is not None:
            bring = runner.reading(sources, STATISTICS_BATCH)
        with bring as open_rows:
            statistics = token_statistics(
                sources,
                opened.shape,
                split.train,
                cls=cls,
                backbone=features.backbone,
                device=_statistics_device(cfg),
                open_rows=open_rows,
            )
    task = EncodingTask(
        features=features.sources(),
        responses=responses,
        shape=opened.shape,
        encoder=cfg.encoder,
        readout=readout,
        train_rows=split.train,
        val_rows=split.val,
        statistics=statistics,
        backbone=features.backbone,
    )
    return Prepared(subject=subj, run_dir=run_dir, split_data=opened, split=split, task=task)


def _identified(source: ArraySource) -> ArraySource:
    """Responses, checked: as the store that they are, or by their own digest."""
    digest = data.checked_digest(source.path)
    return source if source.fingerprint else replace(source, fingerprint=digest)


def _stores(cfg: FitConfig) -> data.StoresIn:
    assert cfg.features_dir is not None and cfg.feature is not None  # FitConfig has seen to it
    return data.StoresIn(cfg.features_dir, cfg.feature)


def _statistics_device(cfg: FitConfig) -> str:
    """This process's GPU for the backbone, where it has one and may."""
    import torch

    return "cuda" if cfg.on_the_fly and cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
