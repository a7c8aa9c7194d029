"""Names of units, regions and targets as a person writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.errors import ConfigError, InputError
from raypipe.fmri.config import MvpaJobConfig, RoiConfig, absolute
from raypipe.fmri.units import Target, Unit, check_distinct, parse_roi, parse_sphere


def test_a_unit_is_named_after_what_it_is() -> None:
    unit = Unit(subject="01", roi="V1 left/dorsal", target="face-house")
    assert unit.unit_id == "sub-01_roi-V1-left-dorsal_target-face-house"
    assert Unit(subject="01", roi="V1").unit_id == "sub-01_roi-V1"


def test_units_that_would_share_files_are_refused() -> None:
    one, other = Unit(subject="1", roi="a b"), Unit(subject="1", roi="a-b")
    check_distinct([one, Unit(subject="2", roi="a b")])
    with pytest.raises(InputError, match=r"'a b'.*'a-b'.*sub-1_roi-a-b"):
        check_distinct([one, other])


def test_targets_are_all_classes_some_or_numbers() -> None:
    assert Target.parse("all") == Target(name="all")
    assert Target.parse("face, house") == Target(name="face-house", classes=("face", "house"))
    assert Target.parse("number:rating") == Target(name="rating", column="rating")
    for wrong in ("face", "face,face", "number:", ""):
        with pytest.raises(ConfigError):
            Target.parse(wrong)


def test_regions_are_masks_spheres_or_the_brain() -> None:
    assert parse_roi("V1=a/{subject}.nii.gz").source == "a/{subject}.nii.gz"
    assert parse_roi("masks/ffa.nii.gz").name == "ffa"
    assert parse_roi("brain").kind == "brain"
    assert parse_sphere("FFA=40,-52,-18.5", 6.0).centre_mm == (40.0, -52.0, -18.5)
    for wrong in ("=a.nii", "V1="):
        with pytest.raises(ConfigError):
            parse_roi(wrong)
    for wrong in ("FFA=1,2", "FFA=a,b,c", "=1,2,3"):
        with pytest.raises(ConfigError):
            parse_sphere(wrong, 6.0)


def test_options_that_contradict_each_other_are_refused() -> None:
    here = {"run_dir": Path("r"), "table": Path("t.csv")}
    with pytest.raises(ConfigError, match="both of bids_dir and table"):
        RoiConfig(**here, bids_dir=Path("b"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no atlas"):
        RoiConfig(**here, atlas_labels=("1",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'V1' is given twice"):
        RoiConfig(**here, roi=("V1=a.nii", "V1=b.nii"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="delay_s is not given"):
        MvpaJobConfig(**here)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="target is given twice"):
        MvpaJobConfig(**here, delay_s=0, target=("a,b", "a, b"))  # type: ignore[arg-type]


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = MvpaJobConfig(
        run_dir=Path("r"), table=Path("t.csv"), roi=("m/V1.nii", "brain"), labels="l.txt", delay_s=0
    )
    made = absolute(cfg)
    assert made.run_dir == tmp_path / "r"
    assert made.roi == (f"V1={tmp_path}/m/V1.nii", "brain")
    assert made.labels == f"{tmp_path}/l.txt"
