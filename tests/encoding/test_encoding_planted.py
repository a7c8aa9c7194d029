"""The planted dataset: its layout is the challenge's, its signal and noise are as declared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from encoding_kit import PLANTED, World
from PIL import Image

from raypipe.encoding import PlantedConfig, make_planted_dataset
from raypipe.encoding.planted import FAMILIES, N_ROIS, fields, plant_hemisphere, respond
from raypipe.encoding.stimuli import quantity_maps, receptive_field
from raypipe.errors import ConfigError
from raypipe.read import AlgonautsSubject, available_subjects

TINY = PlantedConfig(subjects=("07",), n_train=20, n_test=2, vertices_per_hemi=60)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_reader_takes_it_for_the_challenge(world: World) -> None:
    assert available_subjects(world.data) == ("01", "02")
    subject = AlgonautsSubject.open(world.data, "2")
    assert len(subject.image_paths("train")) == PLANTED.n_train
    assert len(subject.image_paths("test")) == PLANTED.n_test
    assert Image.open(subject.image_paths("train")[0]).size == (425, 425)
    assert subject.missing_families() == ()
    rois = subject.rois()
    assert len(rois["lh"]) == N_ROIS == 24
    assert all(mask.any() for hemi in ("lh", "rh") for mask in rois[hemi].values())
    members = sum(mask.astype(int) for mask in rois["lh"].values())
    assert (members == 0).sum() >= 10 and (members == 2).sum() >= 5
    for split, n in (("train", PLANTED.n_train), ("test", PLANTED.n_test)):
        for path in subject.fmri(split).values():
            assert np.load(path).shape == (n, PLANTED.vertices_per_hemi)
            assert np.load(path).dtype == np.float32
    ceiling = np.load(subject.noise_ceiling()["rh"])
    assert ceiling.min() == 0 and 0.4 < ceiling.max() < 0.85


def test_the_same_seed_is_the_same_dataset_and_another_is_not(tmp_path: Path) -> None:
    first = digests(make_planted_dataset(tmp_path / "a", TINY))
    again = digests(make_planted_dataset(tmp_path / "b", TINY))
    other = PlantedConfig(**{**TINY.__dict__, "seed": 1})
    assert first == again
    third = digests(make_planted_dataset(tmp_path / "c", other))
    assert third["subj07/training_split/training_fmri/lh_training_fmri.npy"] not in first.values()


def test_it_is_kept_refused_or_made_again(tmp_path: Path) -> None:
    folder = make_planted_dataset(tmp_path / "a", TINY)
    before = (folder / "planted.json").stat().st_mtime_ns
    make_planted_dataset(folder, TINY)
    assert (folder / "planted.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="n_train 20 there, 21 asked"):
        make_planted_dataset(folder, PlantedConfig(**{**TINY.__dict__, "n_train": 21}))
    (folder / "planted.json").unlink()  # a run that broke off has none
    make_planted_dataset(folder, TINY)
    assert json.loads((folder / "planted.json").read_text())["settings"]["n_train"] == 20


@pytest.mark.parametrize(
    "options",
    [
        {"noise_ceiling": (0.8, 0.4)},
        {"noise_ceiling": (0.0, 0.4)},
        {"vertices_per_hemi": 40},
        {"n_train": 5},
        {"subjects": ("1",)},
        {"subjects": ()},
    ],
)
def test_bad_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PlantedConfig(**options)  # type: ignore[arg-type]


def test_the_ceiling_is_the_explained_variance() -> None:
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((20_000, 4)) * [1, 5, 0.1, 2] + [0, 9, -3, 0]
    nc = np.array([0.0, 0.25, 0.5, 0.81])
    response = respond(signal, nc, signal.mean(0), signal.std(0), rng)
    np.testing.assert_allclose(response.var(0), 1, atol=0.05)
    r = [np.corrcoef(signal[:, v], response[:, v])[0, 1] for v in range(4)]
    np.testing.assert_allclose(r, np.sqrt(nc), atol=0.02)


def test_a_hemisphere_keeps_its_word() -> None:
    truth = plant_hemisphere(PLANTED, np.random.default_rng(1))
    np.testing.assert_allclose(truth.pooling.sum(0), 1)
    offset = 0
    for family, rois in FAMILIES.items():
        part = truth.pooling[offset : offset + len(rois)] > 0
        assert (part.sum(0) <= 1).all()  # one label a family, as in the mask files
        for i in range(len(rois)):
            np.testing.assert_array_equal(part[i], truth.labels[family] == i + 1)
        offset += len(rois)
    none = truth.pooling[-1] > 0
    assert not any((labels[none] != 0).any() for labels in truth.labels.values())
    seen = np.random.default_rng(2).standard_normal((3, N_ROIS + 1, 6))
    want = [
        [
            sum(truth.pooling[f, v] * (seen[i, f] @ truth.mixture[:, v]) for f in range(N_ROIS + 1))
            for v in range(10)
        ]
        for i in range(3)
    ]
    np.testing.assert_allclose(truth.signal(seen)[:, :10], want)


def test_quantities_of_plain_images() -> None:
    grey = quantity_maps(Image.new("RGB", (425, 425), (102, 102, 102)))
    np.testing.assert_allclose(grey[0], 0.4)
    np.testing.assert_allclose(grey[1:], 0, atol=1e-12)
    red = quantity_maps(Image.new("RGB", (425, 425), (255, 0, 0)))
    np.testing.assert_allclose([m.mean() for m in red[:3]], [1 / 3, 1, -0.5])
    columns = np.zeros((425, 425, 3), np.uint8)
    columns[:, ::1] = (np.arange(425) // 5 * 3)[None, :, None]
    ramp = quantity_maps(Image.fromarray(columns))
    np.testing.assert_allclose(ramp[3], 3 / 255)
    np.testing.assert_allclose(ramp[4], 0, atol=1e-12)
    np.testing.assert_allclose(ramp[5], 3 / 255)


def test_receptive_fields_lie_where_they_say() -> None:
    at = (np.arange(85) + 0.5) / 85
    for name, x, y, sigma in fields():
        weights = receptive_field(x, y, sigma)
        assert weights.sum() == pytest.approx(1)
        if name != "none":
            assert weights.sum(0) @ at == pytest.approx(x, abs=0.06)
            assert weights.sum(1) @ at == pytest.approx(y, abs=0.06)
    assert len({field[:3] for field in fields()}) == N_ROIS + 1


def test_vertices_that_are_mixed_up_do_not_pass(world: World) -> None:
    """A perfect prediction of the wrong vertex must score near 0, or the demo would prove little."""
    subject = AlgonautsSubject.open(world.data, "01")
    responses = np.load(subject.fmri("train")["lh"]).astype(float)
    r = np.corrcoef(responses.T)
    others = r[~np.eye(len(r), dtype=bool)]
    assert abs(others.mean()) < 0.1 < others.std()
