"""A small Algonauts-layout dataset whose answer is known: planted responses under known noise.

A vertex of an ROI sees a mixture of visual quantities (``stimuli.QUANTITIES``) through that ROI's
Gaussian receptive field; a vertex of two ROIs sees the mean of both, a vertex of none sees the
whole image. Over the training images this signal s has mean 0 and variance 1, and the response is
``sqrt(nc) * s + sqrt(1 - nc) * noise``: ``nc`` is the explainable variance, and ``sqrt(nc)`` the
correlation that a perfect model of the signal reaches. Some vertices are pure noise, ``nc = 0``.

The files are laid out as the challenge's, plus what it withholds: test responses and ceilings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raypipe.encoding.stimuli import QUANTITIES, quantity_maps, receptive_field, stimuli
from raypipe.errors import ConfigError

HEMIS = ("lh", "rh")

# Names and numbers as in the challenge's mapping files; 0 is "Unknown" in each.
FAMILIES: dict[str, tuple[str, ...]] = {
    "prf-visualrois": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"),
    "floc-bodies": ("EBA", "FBA-1", "FBA-2", "mTL-bodies"),
    "floc-faces": ("OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"),
    "floc-places": ("OPA", "PPA", "RSC"),
    "floc-words": ("OWFA", "VWFA-1", "VWFA-2", "mfs-words", "mTL-words"),
}
STREAMS = ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal")
N_ROIS = sum(map(len, FAMILIES.values()))

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """What to plant; the defaults are the demo's.

    noise_ceiling : range of explainable variance that ROI vertices are drawn from.
    """

    subjects: tuple[str, ...] = ("01", "02")
    n_train: int = 240
    n_test: int = 48
    vertices_per_hemi: int = 400
    noise_ceiling: tuple[float, float] = (0.4, 0.85)
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.noise_ceiling
        if not 0 < low <= high < 1:
            raise ConfigError(f"noise ceiling range {low}..{high} must lie inside 0..1, low first")
        if self.vertices_per_hemi < 2 * N_ROIS + 12:
            raise ConfigError(
                f"{self.vertices_per_hemi} vertices a hemisphere do not fill {N_ROIS} ROIs;"
                f" plant {2 * N_ROIS + 12} or more"
            )
        if self.n_train < 20 or self.n_test < 2:
            raise ConfigError(
                f"{self.n_train} training and {self.n_test} test images are too few to learn and"
                " to correlate; plant at least 20 and 2"
            )
        if not self.subjects or not all(s.isdigit() and len(s) == 2 for s in self.subjects):
            raise ConfigError(f"subjects {self.subjects} must be two digits each, e.g. 01 02")


@dataclass(frozen=True)
class Hemisphere:
    """The truth about one hemisphere.

    labels  : family -> (V,) int, 0 for none; streams : (V,) int
    pooling : (n_fields, V) which receptive fields a vertex averages; columns sum to 1
    mixture : (6, V) signed weight of each quantity; nc : (V,) explainable variance
    """

    labels: dict[str, NDArray[np.int64]]
    streams: NDArray[np.int64]
    pooling: Floats
    mixture: Floats
    nc: Floats

    def signal(self, quantities: Floats) -> Floats:
        """Noise-free responses before z-scoring; (n, n_fields, 6) -> (n, V)."""
        seen = np.einsum("nfq,fv->nqv", quantities, self.pooling)
        return np.asarray(np.einsum("nqv,qv->nv", seen, self.mixture))


def make_planted_dataset(out_dir: Path | str, cfg: PlantedConfig | None = None) -> Path:
    """Write ``out_dir/subjXX`` for every subject; a dataset of the same settings is kept.

    ``planted.json`` is written last, so a broken-off run is made again from the start. Returns
    ``out_dir``. Raises ConfigError when the folder holds a dataset of other settings.
    """
    cfg, out_dir = cfg or PlantedConfig(), Path(out_dir)
    note = out_dir / "planted.json"
    settings = json.loads(json.dumps(asdict(cfg)))
    if note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))["settings"]
        if found == settings:
            return out_dir
        raise ConfigError(
            f"{out_dir} holds a planted dataset of other settings ({_difference(found, settings)});"
            " choose another folder or delete it"
        )
    subjects = {subj: _make_subject(out_dir / f"subj{subj}", subj, cfg) for subj in cfg.subjects}
    text = json.dumps(
        {"settings": settings, "fields": _fields_note(), "subjects": subjects}, indent=1
    )
    part = note.with_suffix(".json.part")
    part.write_text(text, encoding="utf-8")
    part.replace(note)
    return out_dir


def _difference(found: dict[str, object], wanted: dict[str, object]) -> str:
    names = [name for name in wanted if found.get(name) != wanted[name]]
    return ", ".join(f"{name} {found.get(name)} there, {wanted[name]} asked" for name in names)


def fields() -> tuple[tuple[str, float, float, float], ...]:
    """Receptive fields: (name, x, y, sigma) as parts of the image side, the same in every subject.

    Early areas see small fields on a ring around the centre, later ones larger and more central
    ones; the last field, for vertices in no ROI, is the whole image.
    """
    rows = []
    for family, (name, rois) in enumerate(FAMILIES.items()):
        early = name == "prf-visualrois"
        for i, roi in enumerate(rois):
            angle = 2 * np.pi * (i / len(rois) + family / 11)
            radius, sigma = (0.28, 0.12) if early else (0.2, 0.16)
            x, y = 0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)
            rows.append((roi, round(float(x), 4), round(float(y), 4), sigma))
    return (*rows, ("none", 0.5, 0.5, 0.6))


def _fields_note() -> list[dict[str, object]]:
    return [dict(zip(("roi", "x", "y", "sigma"), row, strict=True)) for row in fields()]


def plant_hemisphere(cfg: PlantedConfig, rng: np.random.Generator) -> Hemisphere:
    """Draw one hemisphere: a fifth of the vertices lie in no ROI, a tenth in two."""
    n = cfg.vertices_per_hemi
    n_none, n_both = n // 5, n // 10
    home = np.concatenate([np.arange(n - n_none) % N_ROIS, np.full(n_none, N_ROIS)])
    rng.shuffle(home)
    pooling = np.zeros((N_ROIS + 1, n))
    pooling[home, np.arange(n)] = 1
    inside = rng.permutation(np.flatnonzero(home < N_ROIS))
    for vertex in inside[:n_both]:
        pooling[_roi_of_another_family(int(home[vertex]), rng), vertex] = 1
    nc = rng.uniform(*cfg.noise_ceiling, size=n)
    outside = np.flatnonzero(home == N_ROIS)
    nc[outside] *= 0.5
    nc[outside[: len(outside) // 4]] = 0.0
    # Signs differ, or all vertices would follow the image's brightness and a pipeline that mixes
    # vertices up would still reach 60 % of the ceiling; so it stays near 0.
    weights = rng.dirichlet(np.full(len(QUANTITIES), 0.6), size=n)
    mixture = (weights * rng.choice([-1.0, 1.0], size=weights.shape)).T
    return Hemisphere(
        _labels(pooling), _streams(home), pooling / pooling.sum(0), mixture * _SCALE[:, None], nc
    )


# Puts the quantities, measured in very different spreads over the stimuli, on one scale.
_SCALE = 1 / np.array([0.17, 0.05, 0.14, 0.007, 0.007, 0.011])


def _roi_of_another_family(roi: int, rng: np.random.Generator) -> int:
    family_of = np.repeat(np.arange(len(FAMILIES)), [len(rois) for rois in FAMILIES.values()])
    return int(rng.choice(np.flatnonzero(family_of != family_of[roi])))


def _labels(pooling: Floats) -> dict[str, NDArray[np.int64]]:
    labels, at = {}, 0
    for family, rois in FAMILIES.items():
        member = pooling[at : at + len(rois)] > 0
        labels[family] = np.where(member.any(0), member.argmax(0) + 1, 0).astype(np.int64)
        at += len(rois)
    return labels


def _streams(home: NDArray[np.int64]) -> NDArray[np.int64]:
    n_early = len(FAMILIES["prf-visualrois"])
    later = 2 + home % (len(STREAMS) - 1)
    return np.where(home < n_early, 1, np.where(home == N_ROIS, 0, later)).astype(np.int64)


def _make_subject(folder: Path, subj: str, cfg: PlantedConfig) -> dict[str, object]:
    rng = np.random.default_rng([cfg.seed, int(subj)])
    train = _write_images(folder / "training_split/training_images", "train", cfg.n_train, rng)
    test = _write_images(folder / "test_split/test_images", "test", cfg.n_test, rng)
    _write_mappings(folder / "roi_masks")
    means = {}
    for hemi in HEMIS:
        truth = plant_hemisphere(cfg, rng)
        signals = truth.signal(train), truth.signal(test)
        _write_responses(folder, hemi, truth, signals, rng)
        _write_truth(folder, hemi, truth)
        means[hemi] = round(float(np.sqrt(truth.nc[truth.nc > 0]).mean()), 6)
    return {"mean_ceiling_r": means, "vertices": cfg.vertices_per_hemi}


def _write_images(folder: Path, kind: str, n: int, rng: np.random.Generator) -> Floats:
    """Write the PNGs; returns what each receptive field sees of each, (n, n_fields, 6)."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.stack([receptive_field(x, y, sigma) for _, x, y, sigma in fields()])
    scenes = np.sort(rng.choice(np.arange(1, 73001), size=n, replace=False))  # NSD has 73,000
    seen: list[Floats] = []
    for row, image in enumerate(stimuli(n, rng)):
        path = folder / f"{kind}-{row + 1:04d}_nsd-{scenes[row]:05d}.png"
        image.save(path, compress_level=1)  # several times faster than the default 6
        seen.append(np.tensordot(weights, quantity_maps(image), axes=([1, 2], [1, 2])))
    return np.stack(seen)


def _write_responses(
    folder: Path, hemi: str, truth: Hemisphere, signals: Sequence[Floats], rng: np.random.Generator
) -> None:
    mean, std = signals[0].mean(0), signals[0].std(0)
    places = ("training_split/training_fmri", "training"), ("test_split/test_fmri", "test")
    for signal, (place, kind) in zip(signals, places, strict=True):
        response = respond(signal, truth.nc, mean, std, rng)
        (folder / place).mkdir(parents=True, exist_ok=True)
        np.save(folder / place / f"{hemi}_{kind}_fmri.npy", response.astype(np.float32))


def respond(
    signal: Floats, nc: Floats, mean: Floats, std: Floats, rng: np.random.Generator
) -> Floats:
    """Responses to ``signal`` (n, V) of which the part ``nc`` (V,) of the variance is explainable.

    mean, std : (V,) of the signal over the training images.
    """
    noise = rng.standard_normal(signal.shape)
    return np.asarray(np.sqrt(nc) * (signal - mean) / std + np.sqrt(1 - nc) * noise)


def _write_mappings(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for family, rois in {**FAMILIES, "streams": STREAMS}.items():
        mapping = {0: "Unknown", **dict(enumerate(rois, start=1))}
        # The challenge's own format: a 0-d object array that pickles a dict.
        np.save(folder / f"mapping_{family}.npy", np.array(mapping, dtype=object))


def _write_truth(folder: Path, hemi: str, truth: Hemisphere) -> None:
    for family, labels in {**truth.labels, "streams": truth.streams}.items():
        np.save(folder / "roi_masks" / f"{hemi}.{family}_challenge_space.npy", labels)
    (folder / "noise_ceiling").mkdir(exist_ok=True)
    np.save(folder / "noise_ceiling" / f"{hemi}_noise_ceiling.npy", truth.nc.astype(np.float32))
