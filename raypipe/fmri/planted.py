"""Synthetic subjects whose answer is known: patterns planted in some ROIs and in no others.

Every ROI responds to every stimulus; only in planted ones does the pattern over voxels tell which
class it was. Around that lies what makes fMRI hard: autocorrelated noise, partly shared by neighbours,
slow drift, and head motion that the confounds table names. Written as fMRIPrep writes:
``sub-01/func/…_desc-preproc_bold.nii.gz`` (int16 with slope and intercept), brain mask, confounds,
events; beside them ``atlas.nii.gz``, ``atlas.tsv``, and the truth, ``planted.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.signal import lfilter
from scipy.stats import gamma

from raypipe.errors import ConfigError
from raypipe.report.saved import read_json, write_bytes, write_json
from raypipe.store.space import explain_os_errors

Floats = NDArray[np.float64]

SPACE, TASK = "MNI152NLin2009cAsym", "demo"
SHAPE = (27, 33, 27)
# 6 mm voxels over the MNI brain.
AFFINE = np.array([[6.0, 0, 0, -78], [0, 6, 0, -112], [0, 0, 6, -70], [0, 0, 0, 1]])
_CENTRE_MM, _RADII_MM = (
    np.array([0.0, -18, 10]),
    np.array([68.0, 86, 62]),
)  # the brain: an ellipsoid

# ROI -> (x, y, z) in mm of its right half; the left one is its mirror image.
PLANTED = {"occipital": (14, -86, 4), "fusiform": (38, -56, -16), "parietal": (24, -60, 46)}
EMPTY = {"motor": (38, -20, 48), "frontal": (28, 40, 20), "temporal": (52, -12, -14)}
MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
_ROI_RADIUS_MM = 13.0
_LEAD, _GAP = 4, 4  # volumes before the first block, and of rest after each


@dataclass(frozen=True, kw_only=True)
class PlantedFmriConfig:
    """What to plant; sizes in percent of a voxel's mean are those of block designs at 3 T."""

    subjects: int = 6
    runs: int = 4
    classes: tuple[str, ...] = ("face", "house", "tool", "word")
    blocks: int = 2  # of each class a run
    block_volumes: int = 6
    t_r_s: float = 2.0
    response_percent: float = 1.0  # to any stimulus, in every ROI
    pattern_percent: float = 0.5  # standard deviation over voxels of what tells classes apart
    noise_percent: float = 1.2
    autocorrelation: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.subjects < 2 or self.runs < 2 or len(set(self.classes)) < 2 or self.blocks < 1:
            raise ConfigError(
                f"{self.subjects} subjects, {self.runs} runs, {len(set(self.classes))} classes and "
                f"{self.blocks} blocks are too few; plant at least 2, 2, 2 and 1"
            )
        if not 0 <= self.autocorrelation < 1:
            raise ConfigError(
                f"autocorrelation {self.autocorrelation} is not in 0..1, 1 excluded; 0.3 to 0.5 is "
                "usual"
            )

    @property
    def n_volumes(self) -> int:
        """Volumes of a run."""
        return _LEAD + len(self.classes) * self.blocks * (self.block_volumes + _GAP)

    @property
    def subject_names(self) -> tuple[str, ...]:
        """01, 02, …"""
        return tuple(f"{n:02d}" for n in range(1, self.subjects + 1))


@dataclass(frozen=True, eq=False, kw_only=True)
class Anatomy:
    """brain : (n,) flat voxels; rois : name -> (k,) places in ``brain``."""

    brain: NDArray[np.int64]
    rois: Mapping[str, NDArray[np.int64]]


def make_planted_subjects(out_dir: Path, cfg: PlantedFmriConfig | None = None) -> Path:
    """Write the data set unless the same one is there; returns its folder.

    Raises NoSpace on a full disk.
    """
    cfg = cfg or PlantedFmriConfig()
    truth = {"planted": list(PLANTED), "empty": list(EMPTY), "config": asdict(cfg)}
    truth = json.loads(json.dumps(truth))  # tuples as they come back
    file = out_dir / "planted.json"
    if file.is_file() and read_json(file, "remove it, the data are made again") == truth:
        return out_dir
    anatomy = find_anatomy()
    with explain_os_errors(out_dir, 0):
        file.unlink(missing_ok=True)
        out_dir.mkdir(parents=True, exist_ok=True)
        _write_atlas(out_dir, anatomy)
        described = {"Name": "planted", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}
        write_json(out_dir / "dataset_description.json", described)
        for number, subject in enumerate(cfg.subject_names):
            _write_subject(out_dir, cfg, anatomy, subject, number)
        write_json(file, truth)  # last: where it stands, all of it does
    return out_dir


def find_anatomy() -> Anatomy:
    """The brain and its ROIs on the grid."""
    mm = _centres_mm()
    inside = (((mm - _CENTRE_MM) / _RADII_MM) ** 2).sum(1) <= 1
    brain = np.flatnonzero(inside).astype(np.int64)
    rois = {}
    for name, right in {**PLANTED, **EMPTY}.items():
        centres = np.array([right, (-right[0], *right[1:])])
        near = ((mm[brain, np.newaxis] - centres) ** 2).sum(2).min(1) <= _ROI_RADIUS_MM**2
        rois[name] = np.flatnonzero(near).astype(np.int64)
    return Anatomy(brain=brain, rois=rois)


def response(t_r_s: float) -> Floats:
    """The haemodynamic response over 32 s, one value a volume, of sum 1: a peak at 5 s, undershoot."""
    t = np.arange(0, 32, t_r_s)
    shape = gamma.pdf(t, 6) - gamma.pdf(t, 16) / 6
    return np.asarray(shape / shape.sum())


def _centres_mm() -> Floats:
    """(x*y*z, 3) of every voxel, in C order."""
    ijk = np.indices(SHAPE).reshape(3, -1).T
    return np.asarray(ijk @ AFFINE[:3, :3].T + AFFINE[:3, 3])


def _write_subject(
    root: Path, cfg: PlantedFmriConfig, anatomy: Anatomy, subject: str, number: int
) -> None:
    rng = np.random.default_rng([cfg.seed, number])
    folder = root / f"sub-{subject}" / "func"
    folder.mkdir(parents=True, exist_ok=True)
    mean = rng.uniform(850, 1150, anatomy.brain.size)
    patterns = _patterns(cfg, anatomy, rng)
    loadings = rng.normal(0, 0.3, (anatomy.brain.size, len(MOTION)))
    for run in range(1, cfg.runs + 1):
        order = _block_order(cfg, rng)
        motion = np.cumsum(rng.normal(0, 0.15, (cfg.n_volumes, len(MOTION))), axis=0)
        shown = _responses(cfg, order)
        percent = patterns @ shown + loadings @ motion.T + _noise(cfg, anatomy, rng)
        values = mean[:, np.newaxis] * (1 + percent / 100)
        stem = f"sub-{subject}_task-{TASK}_run-{run}"
        _save_scan(folder / f"{stem}_space-{SPACE}_desc-preproc_bold.nii.gz", values, anatomy, cfg)
        _save_mask(folder / f"{stem}_space-{SPACE}_desc-brain_mask.nii.gz", anatomy)
        _save_confounds(folder / f"{stem}_desc-confounds_timeseries.tsv", motion)
        _save_events(folder / f"{stem}_events.tsv", cfg, order)


def _patterns(cfg: PlantedFmriConfig, anatomy: Anatomy, rng: np.random.Generator) -> Floats:
    """(n_voxels, n_classes) responses in percent; the same for all classes where none is planted."""
    patterns = np.zeros((anatomy.brain.size, len(cfg.classes)))
    for name, voxels in anatomy.rois.items():
        common = cfg.response_percent * rng.uniform(0.5, 1.5, (voxels.size, 1))
        own = rng.normal(0, cfg.pattern_percent, (voxels.size, len(cfg.classes)))
        patterns[voxels] = common + (own if name in PLANTED else 0.0)
    return patterns


def _block_order(cfg: PlantedFmriConfig, rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.permutation(np.repeat(np.arange(len(cfg.classes)), cfg.blocks))


def _onsets(cfg: PlantedFmriConfig) -> NDArray[np.int64]:
    """The first volume of each block."""
    return _LEAD + np.arange(len(cfg.classes) * cfg.blocks) * (cfg.block_volumes + _GAP)


def _responses(cfg: PlantedFmriConfig, order: NDArray[np.int64]) -> Floats:
    """(n_classes, n_volumes) expected responses, 1 where a long block has settled."""
    on = np.zeros((len(cfg.classes), cfg.n_volumes))
    for kind, onset in zip(order, _onsets(cfg), strict=True):
        on[kind, onset : onset + cfg.block_volumes] = 1
    return np.asarray(lfilter(response(cfg.t_r_s), [1.0], on, axis=1))


def _noise(cfg: PlantedFmriConfig, anatomy: Anatomy, rng: np.random.Generator) -> Floats:
    """(n_voxels, n_volumes) percent: AR(1), a third of its variance shared with neighbours; drift."""
    n, m = anatomy.brain.size, cfg.n_volumes
    burn = 20  # until the autocorrelated noise is stationary
    own = rng.standard_normal((n, m + burn))
    field = rng.standard_normal((*SHAPE, m + burn)).astype(np.float32)
    field = gaussian_filter(field, sigma=(1, 1, 1, 0)).reshape(-1, m + burn)[anatomy.brain]
    white = np.sqrt(2 / 3) * own + np.sqrt(1 / 3) * field / field.std()
    rho = cfg.autocorrelation
    noise = lfilter([np.sqrt(1 - rho**2)], [1, -rho], white, axis=1)[:, burn:]
    t = np.linspace(0, 1, m)
    slow = np.stack([t - 0.5, np.cos(np.pi * t), np.cos(2 * np.pi * t)])
    return np.asarray(cfg.noise_percent * noise + rng.normal(0, 0.6, (n, 3)) @ slow)


def _image(
    values: NDArray[np.generic], dtype: type, t_r_s: float | None = None
) -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(values, AFFINE)
    image.header.set_data_dtype(dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(AFFINE, code=4)
    image.set_qform(AFFINE, code=4)
    if t_r_s is not None:
        image.header.set_zooms((*image.header.get_zooms()[:3], t_r_s))
    return image


def _save_scan(path: Path, values: Floats, anatomy: Anatomy, cfg: PlantedFmriConfig) -> None:
    """float values as int16 with the slope and intercept that nibabel chooses."""
    whole = np.zeros((int(np.prod(SHAPE)), cfg.n_volumes), np.float32)
    whole[anatomy.brain] = values
    nibabel.save(_image(whole.reshape(*SHAPE, -1), np.int16, cfg.t_r_s), path)


def _save_mask(path: Path, anatomy: Anatomy) -> None:
    mask = np.zeros(int(np.prod(SHAPE)), np.uint8)
    mask[anatomy.brain] = 1
    nibabel.save(_image(mask.reshape(SHAPE), np.uint8), path)


def _write_atlas(root: Path, anatomy: Anatomy) -> None:
    labels = np.zeros(int(np.prod(SHAPE)), np.uint8)
    lines = ["index\tname"]
    for number, (name, voxels) in enumerate(anatomy.rois.items(), start=1):
        labels[anatomy.brain[voxels]] = number
        lines.append(f"{number}\t{name}")
    nibabel.save(_image(labels.reshape(SHAPE), np.uint8), root / "atlas.nii.gz")
    write_bytes(root / "atlas.tsv", ("\n".join(lines) + "\n").encode())


def _save_confounds(path: Path, motion: Floats) -> None:
    """fMRIPrep's names; the first framewise displacement has no value, as there."""
    moved = np.abs(np.diff(motion, axis=0)).sum(axis=1)
    lines = ["\t".join([*MOTION, "framewise_displacement"])]
    for row, fd in zip(motion, ["n/a", *(f"{x:.6f}" for x in moved)], strict=True):
        lines.append("\t".join([*(f"{x:.6f}" for x in row), fd]))
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def _save_events(path: Path, cfg: PlantedFmriConfig, order: NDArray[np.int64]) -> None:
    lines = ["onset\tduration\ttrial_type"]
    for kind, onset in zip(order, _onsets(cfg), strict=True):
        begin, length = onset * cfg.t_r_s, cfg.block_volumes * cfg.t_r_s
        lines.append(f"{begin:.3f}\t{length:.3f}\t{cfg.classes[kind]}")
    write_bytes(path, ("\n".join(lines) + "\n").encode())
