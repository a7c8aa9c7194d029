"""The loader against nilearn's NiftiMasker; decisions before reading. Its files are test_loader_folders'."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from loader_kit import (
    MAPPING,
    MEMORY,
    SHAPE,
    TR,
    T,
    assert_close,
    bold,
    by_nilearn,
    confounds,
    mask,
    mask_image,
    open_loader,
)
from nifti_kit import AFFINE

import raypipe
from raypipe import (
    MemoryConfig,
    create_memory_efficient_loader,
)
from raypipe.errors import (
    ConfigError,
    InputError,
    MemoryBudgetExceeded,
    RaypipeWarning,
    UnknownName,
)
from raypipe.read.confounds import ConfoundsConfig

CLEANINGS = [
    {},
    {"detrend": True, "standardize": "zscore_sample"},
    {"standardize": "psc"},
    {"detrend": True, "filter": "butterworth", "high_pass": 0.01, "low_pass": 0.1},
    {"filter": "cosine", "high_pass": 0.01, "standardize": "zscore_sample"},
]
SCRUBBED = np.setdiff1d(np.arange(T), [7, 8, 30, 41])


@pytest.mark.parametrize("memory", [MEMORY, MAPPING], ids=["memory", "map"])
@pytest.mark.parametrize("cleaning", CLEANINGS, ids=lambda c: "-".join(map(str, c.values())) or "-")
def test_a_series_is_nilearns(tmp_path: Path, cleaning: dict, memory: MemoryConfig) -> None:
    scan = bold(tmp_path)
    with open_loader(tmp_path, memory) as loader:
        ours = loader.extract_roi_timeseries_memmap(
            scan, mask_image(), confounds=confounds(), sample_mask=SCRUBBED, **cleaning
        )
        assert isinstance(ours, np.memmap) == (memory is MAPPING)
        assert_close(ours, by_nilearn(scan, cleaning, confounds(), SCRUBBED))


@pytest.mark.parametrize("dtype", ["<f4", ">i2", "<i2"])
@pytest.mark.parametrize("name", ["bold.nii", "bold.nii.gz", "bold.img"])
def test_any_kind_of_file_gives_nilearns_values(tmp_path: Path, name: str, dtype: str) -> None:
    scan = bold(tmp_path, name, dtype=dtype)
    image = nibabel.load(scan)
    single = nibabel.Nifti1Image(image.dataobj, image.affine)  # nilearn takes no pair by its name
    with open_loader(tmp_path) as loader:
        assert_close(
            loader.extract_roi_timeseries_memmap(scan, mask_image()), by_nilearn(single, {})
        )


def test_a_region_is_an_image_a_file_an_array_or_indices(tmp_path: Path) -> None:
    scan = bold(tmp_path)
    nibabel.save(mask_image(), tmp_path / "roi.nii.gz")
    given = [mask_image(), tmp_path / "roi.nii.gz", mask(), mask() > 0, np.flatnonzero(mask())]
    with open_loader(tmp_path) as loader:
        found = [loader.extract_roi_timeseries_memmap(scan, roi) for roi in given]
        for one in found[1:]:
            np.testing.assert_array_equal(one, found[0])
        turned = loader.extract_roi(scan, np.flatnonzero(mask())[::-1])
        np.testing.assert_array_equal(turned.values[:, ::-1], found[0])
        np.testing.assert_array_equal(turned.voxels, np.flatnonzero(mask())[::-1])


@pytest.mark.parametrize("memory", [MEMORY, MAPPING], ids=["memory", "map"])
def test_runs_come_end_to_end_each_cleaned_alone(tmp_path: Path, memory: MemoryConfig) -> None:
    scans = [bold(tmp_path, f"run-{n}.nii.gz", seed=n) for n in range(3)]
    kept = [None, SCRUBBED, np.arange(10, T)]
    of_run = [confounds(n, k=n + 1) for n in range(3)]  # as many as each run happens to have
    cleaning = {"detrend": True, "standardize": "zscore_sample"}
    masks = [np.arange(T) if rows is None else rows for rows in kept]
    with open_loader(tmp_path, memory, {"s1": scans}) as loader:
        ours = loader.extract_roi_timeseries_memmap(
            "s1", mask_image(), confounds=of_run, sample_mask=masks, **cleaning
        )
        theirs = [
            by_nilearn(scan, cleaning, values, rows)
            for scan, values, rows in zip(scans, of_run, kept, strict=True)
        ]
        assert_close(ours, np.concatenate(theirs))
        one = loader.extract_roi_timeseries_memmap("s1", mask_image(), run=2, **cleaning)
        assert_close(one, by_nilearn(scans[1], cleaning))


def test_rows_say_which_volume_of_which_run_they_are(tmp_path: Path) -> None:
    scans = [bold(tmp_path, f"run-{n}.nii.gz", seed=n) for n in range(2)]
    rows = np.zeros(T, bool)
    rows[[3, 5]] = True
    with open_loader(tmp_path) as loader:
        found = loader.extract_roi(scans, mask(), sample_mask=[rows, ~rows])
    np.testing.assert_array_equal(found.run, [0] * 2 + [1] * (T - 2))
    np.testing.assert_array_equal(found.volume, np.concatenate([[3, 5], np.flatnonzero(~rows)]))


def _tree(root: Path) -> Path:
    """sub-01 with two runs, brain masks and confounds as fMRIPrep writes them."""
    for run in (1, 2):
        folder = root / "sub-01" / "func"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"sub-01_task-x_run-{run}"
        bold(folder, f"{stem}_space-MNI_desc-preproc_bold.nii.gz", seed=run)
        brain = np.maximum(mask(), mask(9))
        nibabel.save(
            nibabel.Nifti1Image(brain, AFFINE), folder / f"{stem}_space-MNI_desc-brain_mask.nii.gz"
        )
        table = np.column_stack([confounds(run, 2), np.arange(T)])
        lines = ["\t".join(map(str, row)) for row in table]
        lines[0] = "n/a\t" + lines[0].split("\t", 1)[1]
        text = "\n".join(["trans_x\ttrans_y\tother", *lines])
        (folder / f"{stem}_desc-confounds_timeseries.tsv").write_text(text)
    return root


def test_a_tree_gives_its_runs_brain_masks_and_confounds(tmp_path: Path) -> None:
    root = _tree(tmp_path / "derivatives")
    with open_loader(tmp_path, data=root) as loader:
        with pytest.warns(RaypipeWarning, match="no value in the first row"):
            ours = loader.extract_roi_timeseries_memmap(
                "01", mask_image(), confounds=ConfoundsConfig(columns=("trans_x", "trans_y"))
            )
        scan = loader.runs("sub-01")[0].bold
        table = confounds(1, 2)
        table[0, 0] = table[1, 0]
        assert_close(ours[:T], by_nilearn(scan, {}, table))
        small = loader.extract_roi("01", mask())
        wide = loader.extract_roi("01", np.arange(np.prod(SHAPE)))  # not all in the brain mask
        np.testing.assert_array_equal(wide.values[:, np.flatnonzero(mask())], small.values)


@pytest.mark.parametrize(
    ("name", "dtype", "memory", "where"),
    [
        ("bold.nii.gz", "<i2", MAPPING, "temp"),
        ("bold.nii.gz", "<f4", MAPPING, "temp"),
        ("bold.nii", "<i2", MAPPING, "temp"),
        ("bold.nii", "<f4", MAPPING, "file"),
        ("bold.nii", ">f4", MAPPING, "file"),
        ("bold.nii.gz", "<i2", MEMORY, "memory"),
        ("bold.nii", "<f4", MEMORY, "memory"),
    ],
)
def test_a_whole_scan_is_an_image_that_nilearn_takes(
    tmp_path: Path, name: str, dtype: str, memory: MemoryConfig, where: str
) -> None:
    scan = bold(tmp_path, name, dtype=dtype)
    with open_loader(tmp_path, memory) as loader:
        image = loader.load_fmri_memmap(scan)
        values = np.asanyarray(image.dataobj)
        file = getattr(values, "filename", None)
        place = "memory" if file is None else "file" if Path(file) == scan else "temp"
        assert place == where
        np.testing.assert_allclose(values, nibabel.load(scan).get_fdata(), rtol=1e-6)
        assert image.header.get_zooms()[3] == TR
        # Float32 of values of 1000 has 1e-4 of rounding, whoever detrends it.
        detrended = [by_nilearn(one, {"detrend": True}) for one in (image, scan)]
        np.testing.assert_allclose(*detrended, atol=1e-3)
        if file is not None:
            with pytest.raises(ValueError, match="read-only"):
                values[0] = 0


def test_the_decision_is_said_before_anything_is_read(tmp_path: Path) -> None:
    scan = bold(tmp_path)
    body = gzip.decompress(scan.read_bytes())
    scan.write_bytes(gzip.compress(body)[: scan.stat().st_size // 2])  # reading it to its end fails
    said: list[str] = []
    with open_loader(tmp_path, MAPPING, say=said.append) as loader:
        with pytest.raises(InputError, match="bold"):
            loader.extract_roi_timeseries_memmap(scan, mask())
        assert "into a mapped temporary file" in said[0]
        with pytest.raises(InputError, match="bold"):
            loader.load_fmri_memmap(scan)
        assert not list(Path(loader.get_memory_usage_report()["temp_dir"]).glob("*.npy"))
    tight = MemoryConfig(use_memmap=False, max_memory_per_process_gb=1e-4)
    with open_loader(tmp_path, tight) as loader:
        with pytest.raises(MemoryBudgetExceeded, match="set use_memmap"):
            loader.extract_roi_timeseries_memmap(scan, mask())
        with pytest.raises(MemoryBudgetExceeded, match="set use_memmap"):
            loader.load_fmri_memmap(scan)


def test_without_use_memmap_nothing_is_a_map(tmp_path: Path) -> None:
    never = MemoryConfig(use_memmap=False, memmap_threshold_gb=0, available_memory_buffer=0.0)
    scan = bold(tmp_path, "bold.nii", dtype="<f4")
    with open_loader(tmp_path, never) as loader:
        assert not isinstance(loader.extract_roi_timeseries_memmap(scan, mask()), np.memmap)
        assert not isinstance(np.asanyarray(loader.load_fmri_memmap(scan).dataobj), np.memmap)


def test_the_report_tells_what_is_held(tmp_path: Path) -> None:
    with open_loader(tmp_path, MAPPING) as loader:
        made = loader.create_shared_memmap(np.zeros((300, 1024)), "noise")
        told = loader.get_memory_usage_report()
        assert told["maps"][0]["path"] == str(made.path)
        assert told["temp_bytes"] >= made.nbytes
        assert told["budget_bytes"] == MAPPING.budget_bytes
        assert told["charge_bytes"] > 1 << 20
        assert told["decisions"] == ["noise: 2.34 MiB into a mapped temporary file"]


def test_wrong_requests_are_refused_in_one_line(tmp_path: Path) -> None:
    scans = [bold(tmp_path, f"{n}.nii.gz") for n in range(2)]
    with open_loader(tmp_path, data={"s1": scans}) as loader:
        with pytest.raises(UnknownName, match="s1"):
            loader.load_fmri_memmap("s2")
        with pytest.raises(InputError, match="2 runs, 1, 2; choose one"):
            loader.load_fmri_memmap("s1")
        with pytest.raises(UnknownName, match="run '3'"):
            loader.load_fmri_memmap("s1", run=3)
        with pytest.raises(InputError, match="a list of 2"):
            loader.extract_roi("s1", mask(), confounds=confounds())
        with pytest.raises(InputError, match="one row a volume"):
            loader.extract_roi("s1", mask(), confounds=confounds()[1:], run=1)
        with pytest.raises(InputError, match="holds no voxel"):
            loader.extract_roi("s1", np.zeros(SHAPE))
        with pytest.raises(InputError, match="neither a mask of the grid"):
            loader.extract_roi("s1", np.ones((2, 2, 2)))
        with pytest.raises(InputError, match=r"voxel 210 lies outside 0\.\.209"):
            loader.extract_roi("s1", [0, 210])
        with pytest.raises(ConfigError, match="no filter"):
            loader.extract_roi_timeseries_memmap("s1", mask(), high_pass=0.01)
        shifted = AFFINE.copy()
        shifted[0, 3] += 1
        with pytest.raises(InputError, match="away from the scan's grid"):
            loader.extract_roi("s1", nibabel.Nifti1Image(mask(), shifted))


def test_voxels_that_say_nothing_are_counted_and_told(tmp_path: Path) -> None:
    scan = bold(tmp_path, "bold.nii", dtype="<f4")
    image = nibabel.load(scan)
    values = np.ascontiguousarray(image.get_fdata(dtype=np.float32))
    places = np.flatnonzero(mask())
    flat = values.reshape(-1, T)
    flat[places[0], 5], flat[places[1]] = np.nan, 3.0
    nibabel.save(nibabel.Nifti1Image(values, image.affine, image.header), tmp_path / "bad.nii")
    with open_loader(tmp_path) as loader:
        with pytest.warns(RaypipeWarning, match="1 hold NaN or infinity and 1 are constant"):
            found = loader.extract_roi(tmp_path / "bad.nii", mask())
        np.testing.assert_array_equal(np.flatnonzero(found.not_finite), [0])
        np.testing.assert_array_equal(np.flatnonzero(found.constant), [1])


def test_a_loader_says_where_its_options_come_from(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAYPIPE_MEMMAP_THRESHOLD", "3GiB")
    said: list[str] = []
    loader = create_memory_efficient_loader(say=said.append, temp_dir=tmp_path)
    assert "environment RAYPIPE_MEMMAP_THRESHOLD" in said[0]
    assert loader.memory.memmap_threshold_gb == 3.0


def test_importing_raypipe_stays_cheap() -> None:
    code = (
        "import sys, raypipe; assert 'MemoryEfficientLoader' in dir(raypipe);"
        "heavy = {'numpy', 'torch', 'ray', 'nibabel', 'nilearn'} & set(sys.modules);"
        "assert not heavy, heavy; raypipe.MemoryEfficientLoader;"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        raypipe.Nothing  # noqa: B018
