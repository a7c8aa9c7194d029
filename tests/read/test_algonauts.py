"""The Algonauts layout: found, normalised, checked; what does not fit is said in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raypipe.errors import ConfigError, InputError, MissingInput, UnknownName
from raypipe.read import (
    ALL_FAMILIES,
    AlgonautsSubject,
    available_subjects,
    normalise_subject,
)

# The challenge's own names, family by family: 24 ROIs without the streams.
FAMILIES = {
    "prf-visualrois": ["V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"],
    "floc-bodies": ["EBA", "FBA-1", "FBA-2", "mTL-bodies"],
    "floc-faces": ["OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"],
    "floc-places": ["OPA", "PPA", "RSC"],
    "floc-words": ["OWFA", "VWFA-1", "VWFA-2", "mfs-words", "mTL-words"],
    "streams": [
        "early",
        "midventral",
        "midlateral",
        "midparietal",
        "ventral",
        "lateral",
        "parietal",
    ],
}
VERTICES = {"lh": 50, "rh": 41}


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=True)
    return path


def make_subject(root: Path, *, n: int = 6, families: tuple[str, ...] = ALL_FAMILIES) -> Path:
    rng = np.random.default_rng(1)
    for split, name, count in (("training", "train", n), ("test", "test", 3)):
        folder = root / f"{split}_split" / f"{split}_images"
        folder.mkdir(parents=True)
        for k in range(1, count + 1):
            Image.new("RGB", (4, 4)).save(folder / f"{name}-{k:04d}_nsd-{7 * k:05d}.png")
    for hemi, size in VERTICES.items():
        fmri = rng.standard_normal((n, size)).astype(np.float32)
        save(root / f"training_split/training_fmri/{hemi}_training_fmri.npy", fmri)
        for family in families:
            labels = rng.integers(0, len(FAMILIES[family]), size)  # the last ROI has no vertex
            save(root / f"roi_masks/{hemi}.{family}_challenge_space.npy", labels)
    for family in families:
        mapping = {0: "Unknown"} | dict(enumerate(FAMILIES[family], start=1))
        save(root / f"roi_masks/mapping_{family}.npy", np.array(mapping, dtype=object))
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_subject(tmp_path / "subj01")
    make_subject(tmp_path / "subj02", families=("floc-faces",))
    (tmp_path / "subj03").mkdir()  # empty: no subject
    (tmp_path / "subjects.txt").touch()
    return tmp_path


@pytest.mark.parametrize("text", ["1", "01", "subj01", "subj1", " 01 ", 1])
def test_subject_is_normalised(text: str | int) -> None:
    assert normalise_subject(text) == "01"


@pytest.mark.parametrize("text", ["", "subj", "one", "001", "-1", "1.0", "../01", "subj01/..", "٣"])
def test_no_subject_number(text: str) -> None:
    with pytest.raises(ConfigError):
        normalise_subject(text)


def test_open_from_either_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_subjects(data) == ("01", "02")
    assert available_subjects(data / "subj02") == ("02",)
    above, own = AlgonautsSubject.open(data, "1"), AlgonautsSubject.open(data / "subj01", "subj01")
    assert above == own
    assert (above.root, above.key, above.splits) == (data / "subj01", "01", ("train", "test"))
    monkeypatch.chdir(data / "subj01")
    assert AlgonautsSubject.open(Path(), "01").subj == "01"
    assert pickle.loads(pickle.dumps(above)) == above


def test_linked_subject_folder_is_whose_the_link_says(data: Path, tmp_path: Path) -> None:
    (data / "subj07").symlink_to(data / "subj01")
    assert available_subjects(data) == ("01", "02", "07")
    assert AlgonautsSubject.open(data / "subj07", "07").subj == "07"


def test_wrong_subject(data: Path) -> None:
    with pytest.raises(UnknownName, match=r"subj03.*subj02, subj01.*choose"):
        AlgonautsSubject.open(data, "03")
    with pytest.raises(UnknownName, match="subj01"):
        AlgonautsSubject.open(data / "subj01", "02")  # the folder is another's
    with pytest.raises(MissingInput, match="does not exist"):
        AlgonautsSubject.open(data / "nowhere", "01")
    with pytest.raises(MissingInput, match="holds no subjNN"):
        AlgonautsSubject.open(data / "subj03", "03")
    make_subject(data / "mine")
    with pytest.raises(InputError, match="not named subjNN"):
        AlgonautsSubject.open(data / "mine", "01")
    make_subject(data / "subj2")
    with pytest.raises(InputError, match="same subject"):
        AlgonautsSubject.open(data, "02")


def test_images_and_shard_names(data: Path) -> None:
    subject = AlgonautsSubject.open(data, "01")
    names = [path.name for path in subject.image_paths("train")]
    assert names[:2] == ["train-0001_nsd-00007.png", "train-0002_nsd-00014.png"]
    assert len(names) == 6
    assert len(subject.image_paths("test")) == 3
    assert (subject.shard_name("train"), subject.shard_name("test")) == ("train", "synt")
    for method in (subject.image_paths, subject.shard_name, subject.fmri):
        with pytest.raises(UnknownName, match="split"):
            method("val")


def test_numbers_that_outgrow_their_width_are_refused(data: Path) -> None:
    folder = data / "subj01/training_split/training_images"
    for number in (9999, 10000):
        Image.new("RGB", (4, 4)).save(folder / f"train-{number}_nsd-00001.png")
    with pytest.raises(InputError, match="pad the numbers"):
        AlgonautsSubject.open(data, "01").image_paths()


def test_fmri(data: Path) -> None:
    subject = AlgonautsSubject.open(data, "01")
    paths = subject.fmri("train")
    assert {hemi: np.load(path).shape for hemi, path in paths.items()} == {
        "lh": (6, 50),
        "rh": (6, 41),
    }
    assert subject.n_vertices() == VERTICES
    with pytest.raises(MissingInput, match="withholds"):
        subject.fmri("test")
    for hemi, size in VERTICES.items():
        save(
            subject.root / f"test_split/test_fmri/{hemi}_test_fmri.npy",
            np.zeros((3, size), np.float32),
        )
    assert set(subject.fmri("test")) == {"lh", "rh"}


def test_fmri_that_does_not_fit(data: Path) -> None:
    subject = AlgonautsSubject.open(data, "01")
    path = subject.fmri()["rh"]
    for wrong, says in (
        (np.zeros((5, 41), np.float32), "same images"),
        (np.zeros(6, np.float32), "shape"),
        (np.zeros((6, 41), np.int16), "floats"),
        (np.array({1: "a"}, dtype=object), "not a readable"),
    ):
        save(path, wrong)
        with pytest.raises(InputError, match=says) as caught:
            subject.fmri()
        assert "\n" not in str(caught.value)
    whole = save(path, np.zeros((6, 41), np.float32)).read_bytes()
    for length in (0, 5, 40, len(whole) - 1):  # a truncated copy must not become a SIGBUS later
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="copy the file again"):
            subject.fmri()
    with path.open("wb") as stream:
        np.savez(stream, a=np.zeros((6, 41)))
    with pytest.raises(InputError, match="npz"):
        subject.fmri()


def test_rois(data: Path) -> None:
    subject = AlgonautsSubject.open(data, "01")
    assert subject.missing_families() == ()
    rois = subject.rois()
    assert list(rois) == ["lh", "rh"]
    assert (
        set(rois["lh"])
        == set(rois["rh"])
        == {n for f, ns in FAMILIES.items() if f != "streams" for n in ns}
    )
    assert len(rois["lh"]) == 24
    for hemi, masks in rois.items():
        for family in ALL_FAMILIES[:-1]:
            labels = np.load(subject.root / f"roi_masks/{hemi}.{family}_challenge_space.npy")
            for label, name in enumerate(FAMILIES[family], start=1):
                np.testing.assert_array_equal(masks[name], labels == label)
                assert masks[name].dtype == bool
                assert type(masks[name]) is np.ndarray
            assert not masks[FAMILIES[family][-1]].any()  # named, without a vertex: kept, empty
    assert list(subject.rois(families=("streams",))["lh"]) == FAMILIES["streams"]
    with pytest.raises(UnknownName, match="floc-faces"):
        subject.rois(families=("faces",))


def test_absent_families_are_told(data: Path) -> None:
    subject = AlgonautsSubject.open(data, "02")
    assert set(subject.missing_families()) == set(ALL_FAMILIES) - {"floc-faces"}
    assert list(subject.rois()["rh"]) == FAMILIES["floc-faces"]
    bare = make_subject(data / "subj04", families=())
    assert AlgonautsSubject(bare, "04").rois() == {"lh": {}, "rh": {}}


def test_rois_that_do_not_fit(data: Path) -> None:
    subject = AlgonautsSubject.open(data, "01")
    masks = subject.root / "roi_masks"
    mask = masks / "lh.floc-faces_challenge_space.npy"
    good = np.load(mask)
    for wrong, says in (
        (good[:-1], "different subjects"),
        (good + 40, "label 4"),
        (good[None], "shape"),
    ):
        save(mask, wrong)
        with pytest.raises(InputError, match=says):
            subject.rois()
    mask.unlink()
    with pytest.raises(MissingInput, match="floc-faces"):
        subject.rois()  # partly there: not silently left out
    save(mask, good)
    save(
        masks / "mapping_floc-faces.npy",
        np.array({k: "EBA" if k == 1 else f"f{k}" for k in range(6)}, dtype=object),
    )
    with pytest.raises(InputError, match="another family"):
        subject.rois()
    save(masks / "mapping_floc-faces.npy", np.array(dict.fromkeys(range(6), "same"), dtype=object))
    with pytest.raises(InputError, match="two labels"):
        subject.rois()


def test_noise_ceiling(data: Path) -> None:
    subject = AlgonautsSubject.open(data, "01")
    assert subject.noise_ceiling() is None
    paths = {h: subject.root / f"noise_ceiling/{h}_noise_ceiling.npy" for h in VERTICES}
    save(paths["lh"], np.linspace(0, 1, 50))
    with pytest.raises(MissingInput, match="both hemispheres"):
        subject.noise_ceiling()
    save(paths["rh"], np.full(41, np.nan, np.float32))
    assert subject.noise_ceiling() == paths
    for wrong, says in (
        (np.linspace(0, 87, 41), "by 100"),
        (np.full(41, -0.1), "0..1"),
        (np.full(41, np.inf), "0..1"),
        (np.zeros(40), "shape"),
        (np.zeros(41, int), "dtype"),
    ):
        save(paths["rh"], wrong)
        with pytest.raises(InputError, match=says):
            subject.noise_ceiling()
