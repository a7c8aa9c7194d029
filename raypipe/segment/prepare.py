"""A fit made ready: pictures found and divided, normalisation measured, task built; nothing written.

Every byte of the files is read, once or twice, a piece at a time: what a run is resumed on must be what
it began with, and what pixels range over must be known before training. A run that goes on does not read
them again (``inputs``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from raypipe import config as configs
from raypipe.errors import ConfigError, InputError
from raypipe.segment.config import SegmentFitConfig
from raypipe.segment.crops import CropSource, Labelling, grid_corners
from raypipe.segment.inputs import Inputs, States, recall, states_of
from raypipe.segment.labels import IGNORE
from raypipe.segment.loss import applied
from raypipe.segment.model import record
from raypipe.segment.normalise import measure
from raypipe.segment.ome_sets import sets_of
from raypipe.segment.pictures import Listed, Picture, list_files, open_listed
from raypipe.segment.readers import Readers
from raypipe.segment.saved import SavedModel
from raypipe.segment.split import asks_for_sets, divide
from raypipe.segment.task import SegmentTask
from raypipe.train import TrainConfig, checkpoint
from raypipe.train.checkpoint import on_disk_bytes
from raypipe.units import format_bytes

_PIECE_BYTES = 4 << 20
_STRIP_ROWS = 256
# Of InputConfig: what the pictures, their splits and their normalisation depend on.
_ASKED = (
    *("axes", "split_by", "val_fraction", "split_seed"),
    *("normalise", "low_percentile", "high_percentile"),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """One fit, checked, and nothing written yet."""

    run_dir: Path
    inputs: Inputs
    task: SegmentTask
    saved: SavedModel

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All of them, with their splits."""
        return self.inputs.pictures

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it goes on from."""
        crops = self.task.crops
        found = {
            "images and masks": crops.fingerprint,
            "normalisation": configs.to_dict(crops.normalisation),
            "labels": configs.to_dict(crops.labelling),
            "crops": [crops.crop, self.task.n_train],
            "augmentation": configs.to_dict(crops.augment),
            "model": record(self.task.spec),
            "loss": configs.to_dict(self.task.loss_config),
        }
        return self.settled(found)

    def settled(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """An identity, of an earlier run perhaps, without what its loss did not use: once such options
        were taken and ignored.
        """
        loss = identity.get("loss")
        if not isinstance(loss, Mapping):
            return dict(identity)
        return {**identity, "loss": applied(loss, self.task.spec.classes)}

    def n_parameters(self) -> int:
        """Trainable numbers."""
        return self._n_parameters

    @cached_property
    def _n_parameters(self) -> int:
        # Once: to fill the default network takes a second.
        return sum(p.numel() for p in self.task.build_model().parameters())

    def disk_bytes(self, train: TrainConfig) -> int:
        """The most that checkpoints take: weights and two AdamW moments for each generation and the one
        being written, and the best weights.
        """
        n = self.n_parameters()
        return 12 * n * (train.keep + 1) + 4 * n

    def missing_bytes(self, cfg: SegmentFitConfig) -> int:
        """What of ``disk_bytes`` must still be free, with the checkpoints that are there."""
        missing = self.disk_bytes(cfg.train) - on_disk_bytes(self.run_dir)
        return max(missing, 12 * self.n_parameters() if cfg.resume else 0)

    def describe(self, cfg: SegmentFitConfig) -> str:
        """What ``--dry-run`` prints. Raises MemoryBudgetExceeded when nothing fits --fit-gpu."""
        from raypipe.train.loop import buffer_bytes

        step, train = self._step_lines(cfg)
        steps = -(-self.task.n_train // train.rows_per_step(cfg.workers))
        batches = buffer_bytes(self.task.sources(), train.batch_size)
        return "\n".join(
            (
                f"{self.counts()}; {self.task.n_train} crops an epoch of {cfg.inputs.crop} x"
                f" {cfg.inputs.crop}, {len(self.task.val_rows)} to validate; {self.n_parameters():,}"
                f" parameters; {train.epochs} epochs of {steps} steps",
                f"  disk    {format_bytes(self.disk_bytes(train))} at most in {self.run_dir}, for"
                " checkpoints. Not in it: logs, the report",
                f"  memory  each of {cfg.workers} worker(s): {format_bytes(16 * self.n_parameters())} on its"
                f" device for weights, gradients and AdamW moments, {format_bytes(2 * batches)} of the host's"
                " for batches. Not in it: Python and torch themselves"
                + ("" if step else ", activations"),
                *(f"    {line}" for line in step),
                "  time    not known before the first steps; training then shows it",
            )
        )

    def counts(self) -> str:
        """``12 pictures to train, 3 to validate, 4 to test``."""
        n = Counter(picture.split for picture in self.pictures)
        return f"{n['train']} pictures to train, {n['val']} to validate, {n['test']} to test"

    def _step_lines(self, cfg: SegmentFitConfig) -> tuple[list[str], TrainConfig]:
        """What a step takes on this machine's own device, and the options that would be used."""
        import torch

        from raypipe.train.choose import plan_here

        if cfg.train.fit_gpu_bytes is None and cfg.train.predict_memory is False:
            return [], cfg.train
        on_cuda = cfg.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if on_cuda else "cpu")
        found = checkpoint.newest(self.run_dir) if cfg.resume else None
        planned = plan_here(self.task, cfg.train, device, cfg.workers, found)
        return planned.lines, planned.cfg


def prepare(cfg: SegmentFitConfig) -> Prepared:
    """Find, check and divide the pictures, and build the task; writes nothing.

    Raises as `list_files`, `open_listed`, `divide`, `measure`; ConfigError (crop and model do not fit),
    InputError (no foreground to validate on, no class where one is named).
    """
    inputs, run_dir = cfg.inputs, cfg.run_dir.resolve()
    labelling = Labelling(
        target=inputs.target, classes=inputs.classes, ignore=cfg.loss.ignore_label
    )
    one_channel = cfg.network.spec(1, inputs.outputs)  # before everything is read
    _check_crop(inputs.crop, int(getattr(one_channel, "multiple", 32)))
    found = _found(cfg, run_dir, list_files(inputs.data.resolve()), labelling)
    spec = cfg.network.spec(found.pictures[0].channels, inputs.outputs)
    crops, n_train = _crops(cfg, found, labelling)
    seed = cfg.train.seed
    task = SegmentTask(crops=crops, n_train=n_train, spec=spec, loss_config=cfg.loss, seed=seed)
    saved = SavedModel(
        spec=spec, normalisation=found.normalisation, target=inputs.target, classes=inputs.classes,
        ignore=cfg.loss.ignore_label, seed=seed,
    )  # fmt: skip
    return Prepared(run_dir=run_dir, inputs=found, task=task, saved=saved)


def _found(
    cfg: SegmentFitConfig, run_dir: Path, listed: list[Listed], labelling: Labelling
) -> Inputs:
    """What the files say: kept from an earlier run of this folder, or read."""
    how = cfg.inputs
    asked = {
        "listed": [[str(o.image), str(o.mask), o.split, o.frames, o.rows, o.cols] for o in listed],
        **{name: getattr(how, name) for name in _ASKED},
        "labels": configs.to_dict(labelling),
    }
    files = [path for one in listed for path in (one.image, one.mask)]
    states = states_of(path.resolve() for path in files if path.is_file())
    kept = recall(run_dir, asked, states) if cfg.resume else None
    return kept or _read(cfg, listed, labelling, asked, states)


def _read(
    cfg: SegmentFitConfig,
    listed: list[Listed],
    labelling: Labelling,
    asked: Mapping[str, Any],
    states: States,
) -> Inputs:
    how, readers = cfg.inputs, Readers()
    opened = open_listed(listed, how.axes)
    pictures = divide(
        opened,
        by=how.split_by,
        val_fraction=how.val_fraction,
        seed=how.split_seed,
        sets=sets_of(p.image for p in opened) if asks_for_sets(opened, how.split_by) else {},
    )
    _check_channels(pictures)
    _check_masks(pictures, labelling, readers)
    normalisation = measure(
        [p for p in pictures if p.split == "train"],
        how.normalise,
        low=how.low_percentile,
        high=how.high_percentile,
        readers=readers,
    )
    return Inputs(
        asked=asked,
        states=states,
        pictures=tuple(pictures),
        normalisation=normalisation,
        digest=digest_of(used(pictures)),
    )


def used(pictures: Iterable[Picture]) -> list[Picture]:
    """Those that train, then those that validate."""
    every = list(pictures)
    return [p for split in ("train", "val") for p in every if p.split == split]


def crops_of(picture: Picture, crop: int, coverage: float) -> int:
    """Training crops an epoch of a picture: ``coverage`` times those that cover it, at least one."""
    return max(1, round(coverage * picture.area / crop**2))


def _crops(cfg: SegmentFitConfig, found: Inputs, labelling: Labelling) -> tuple[CropSource, int]:
    """The source of all samples, and how many of them train."""
    inputs, crop = cfg.inputs, cfg.inputs.crop
    chosen = used(found.pictures)
    picture_of: list[int] = []
    corners: list[tuple[int, int]] = []
    n_train = 0
    for place, picture in enumerate(chosen):
        if picture.split == "train":
            cells = [(-1, -1)] * crops_of(picture, crop, inputs.coverage)
            n_train += len(cells)
        else:
            cells = grid_corners(picture, crop)
        picture_of += [place] * len(cells)
        corners += cells
    source = CropSource(
        pictures=tuple(chosen),
        picture_of=np.array(picture_of, np.int32),
        corner=np.array(corners, np.int64),
        crop=crop,
        labelling=labelling,
        normalisation=found.normalisation,
        augment=cfg.augmentation,
        seed=cfg.train.seed,
        readers=inputs.readers,
        fingerprint=found.digest,
    )
    return source, n_train


def digest_of(pictures: list[Picture]) -> str:
    """xxh3_128 of all files' bytes and of which parts of them are used how; 32 hex digits."""
    whole = xxhash.xxh3_128()
    seen: dict[Path, int] = {}
    for picture in pictures:
        for path in (picture.image, picture.mask):
            if path not in seen:
                seen[path] = len(seen)
                _add_file(whole, path)
        places = seen[picture.image], seen[picture.mask]
        part: tuple[Any, ...] = (*places, picture.frame, picture.rows, picture.cols, picture.split)
        part += (picture.axes,) if picture.axes else ()
        whole.update(repr(part).encode())
    return whole.hexdigest()


def _add_file(whole: Any, path: Path) -> None:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            whole.update(piece)


def _check_channels(pictures: list[Picture]) -> None:
    """Raise InputError where they differ."""
    first = pictures[0]
    for other in pictures:
        if other.channels != first.channels:
            raise InputError(
                f"{other.name} has {other.channels} channels, {first.name} {first.channels}; give images"
                " of one kind"
            )


def _check_crop(crop: int, multiple: int) -> None:
    if crop % multiple:
        raise ConfigError(
            f"crop {crop} is no multiple of {multiple}, by which the model divides; give"
            f" {max(1, round(crop / multiple)) * multiple}, or a smaller --depth"
        )


def _check_masks(pictures: list[Picture], labelling: Labelling, readers: Readers) -> None:
    """Raise InputError for a value that is no class, and when nothing is there to train or tune on."""
    seen: Counter[str] = Counter()
    for picture in pictures:
        for top in range(*picture.rows, _STRIP_ROWS):
            rows = top, min(top + _STRIP_ROWS, picture.rows[1])
            try:
                plane = labelling.plane(readers.mask(picture, rows, picture.cols))
            except InputError as error:
                raise InputError(f"{picture.mask.name}: {error}") from None
            seen[picture.split] += int((plane > 0).sum())
            seen[f"{picture.split} known"] += int((plane != IGNORE).sum())
    for split in ("train", "val"):
        if not seen[split] or not seen[f"{split} known"]:
            raise InputError(
                f"no foreground pixel in the masks of split {split!r}; give masks that show some"
            )
