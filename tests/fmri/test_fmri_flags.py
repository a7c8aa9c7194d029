"""Every flag of the fMRI commands with values that break its rule: one line, exit 2 or 3.

The commands run in this process on two tiny subjects; what is refused is refused before a scan is read.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
from run_kit import make_data

from raypipe.cli import main
from raypipe.fmri.config import MvpaJobConfig, RoiConfig
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.launch import LaunchConfig

# Flag -> (its words on the command line, other flags beside it, what must be said); {data} is the folder.
SHARED: dict[str, list[tuple[list[str], str]]] = {
    "run_dir": [(["{data}/runs.csv/run"], "runs.csv")],
    "bids_dir": [(["{data}"], "both of bids_dir and table")],
    "raw_dir": [(["{data}"], "given without bids_dir")],
    "table": [
        (["absent.csv"], "run table {cwd}/absent.csv does not exist"),
        (["{data}/rois/yes.nii.gz"], "yes.nii.gz"),
    ],
    "subjects": [(["09"], "subject 09 is not in {data}/runs.csv; found: 01, 02")],
    "sessions": [(["z"], "no run of that selection")],
    "task": [(["rest"], "no run of that selection")],
    "runs": [(["9"], "no run of that selection")],
    "space": [(["T1w"], "no run of that selection")],
    "desc": [(["smooth"], "desc 'smooth' is given without bids_dir")],
    "roi": [
        (["=x.nii"], "roi '=x.nii' is not NAME=FILE"),
        (["V1=absent.nii.gz"], "absent.nii.gz does not exist; give a NIfTI file"),
        (["V1={data}/runs.csv"], "runs.csv is not a readable NIfTI image"),
        (["V1={data}/{{session}}.nii"], "names {{session}}, which sub-01 run-1 has not"),
        (["a={data}/rois/yes.nii.gz", "a={data}/rois/no.nii.gz"], "ROI 'a' is given twice"),
        (["a b={data}/rois/yes.nii.gz", "a-b={data}/rois/no.nii.gz"], "name one of them otherwise"),
    ],
    "atlas": [
        (["absent.nii.gz"], "absent.nii.gz does not exist; give a NIfTI file"),
        (["a{{subject}}.nii"], "differs by subject"),
        (["{data}/runs.csv"], "runs.csv is not a readable NIfTI image"),
    ],
    "atlas_labels": [
        (["1"], "are given but no atlas; give --atlas"),
        (["5", "--atlas", "{data}/rois/yes.nii.gz"], "unknown atlas label '5'"),
    ],
    "atlas_names": [
        (["x.tsv"], "are given but no atlas; give --atlas"),
        (["x.tsv", "--atlas", "{data}/rois/yes.nii.gz"], "label table {cwd}/x.tsv does not exist"),
    ],
    "sphere": [
        (["A=1,2"], "sphere 'A=1,2' is not NAME=x,y,z"),
        (["A=nan,0,0"], "has no finite centre"),
        (["=1,2,3"], "has no name"),
        (["A=900,0,0"], "no voxel centre lies within 8 mm"),
    ],
    "radius_mm": [(["0"], "radius_mm 0.0"), (["inf"], "radius_mm inf"), (["nan"], "nan"), (["x"], "x")],
    "filter": [(["fir"], "fir"), (["butterworth"], "no cutoff"), (["cosine"], "high_pass_hz")],
    "low_pass_hz": [
        (["0.1"], "no filter"),
        (["-1", "--filter", "butterworth"], "low_pass_hz -1.0 is not above 0"),
        (["0.05", "--filter", "butterworth", "--high-pass-hz", "0.1"], "nothing would be left"),
        (["9", "--filter", "butterworth"], "low_pass_hz 9.0 is not below 0.25 Hz"),
    ],
    "high_pass_hz": [
        (["0.01"], "no filter"),
        (["inf", "--filter", "butterworth"], "high_pass_hz inf"),
    ],
    "t_r_s": [(["0"], "t_r_s 0.0"), (["inf"], "t_r_s inf"), (["2s"], "2s")],
    "standardize": [(["z"], "z")],
    "scrub_interpolation": [(["linear"], "linear")],
    "strategy": [
        (["movement"], "unknown confounds strategy 'movement'; nearest: "),
        (["compcor"], "needs high_pass beside it"),
        (["motion"], "sub-01 run-1 has no confounds table"),
        (["motion", "--columns", "x"], "exclude each other"),
    ],
    "columns": [(["csf"], "sub-01 run-1 has no confounds table")],
    "motion": [(["half"], "half")],
    "wm_csf": [(["half"], "half")],
    "global_signal": [(["half"], "half")],
    "compcor": [(["some"], "some")],
    "n_compcor": [(["0"], "n_compcor 0 is below 1"), (["few"], "few")],
    "ica_aroma": [(["half"], "half")],
    "scrub": [(["-1"], "scrub -1 is below 0"), (["x"], "x")],
    "fd_threshold_mm": [(["0"], "fd_threshold_mm 0.0"), (["nan"], "fd_threshold_mm nan")],
    "std_dvars_threshold": [(["-2"], "std_dvars_threshold -2.0"), (["inf"], "inf")],
    "cache_dir": [(["{data}/runs.csv"], "runs.csv")],
    "cache_quota": [(["much"], "size 'much' is not a number with a unit of bytes"), (["-1"], "-1")],
    "workers": [
        (["0"], "workers 0 is below 1"),
        (["two"], "two"),
        (["2"], "--workers 2 needs --runner ray"),
    ],
    "runner": [(["dask"], "dask")],
    "max_memory_per_process": [
        (["lots"], "max_memory_per_process 'lots'"),
        (["5"], "below 1 MiB; write a unit: 5GiB"),
        (["0"], "must be above 0"),
        (["400MiB"], "largest unit needs"),
    ],
    "memmap_threshold": [(["x"], "memmap_threshold 'x'"), (["7"], "write a unit: 7GiB")],
    "available_memory_buffer": [(["1.5"], "available_memory_buffer 1.5"), (["x"], "x")],
}  # fmt: skip

ROI: dict[str, list[tuple[list[str], str]]] = {"reduce": [(["median"], "median")]}

MVPA: dict[str, list[tuple[list[str], str]]] = {
    "target": [
        (["cat"], "target 'cat' is not all, two classes or more"),
        (["number:"], "names no column"),
        (["cat,horse"], "class 'horse' has no sample; there are cat, dog"),
        (["number:weight"], "have no column weight; there are onset, duration, trial_type, rating"),
        (["number:trial_type"], "trial_type is no column of numbers"),
        (["cat,dog", "cat, dog"], "a target is given twice"),
        ([], "target"),
    ],
    "labels": [(["absent.txt"], "absent.txt do not exist"), (["{data}/runs.csv"], "runs.csv")],
    "label_column": [(["colour"], "have no column colour; there are onset")],
    "rest": [(["cat", "dog"], "the design has no sample"), (["cat"], "fold 0")],
    "delay_s": [
        (["None"], "delay_s is not given"),
        (["-2"], "delay_s -2.0 is below 0"),
        (["nan"], "delay_s nan"),
        (["inf"], "delay_s inf"),
        (["9999"], "the design has no sample; check labels, delay"),
    ],
    "each": [(["run"], "run")],
    "estimator": [
        (["svm"], "unknown estimator 'svm'; nearest: svr, svc"),
        (["no_such_module.Model"], "no_such_module.Model cannot be made: ModuleNotFoundError"),
        (["sklearn.svm.SVM"], "sklearn.svm.SVM cannot be made: AttributeError"),
        (["os.getcwd"], "os.getcwd is neither classifier nor regressor"),
        (["json.loads"], "json.loads cannot be made: TypeError"),
        (["ridge"], "ridge does not predict classes"),
        (["sklearn.svm.SVC", "--params", "C"], "params 'C' is not NAME=VALUE"),
    ],
    "c": [(["0"], "c 0.0"), (["nan"], "c nan"), (["inf"], "c inf")],
    "alpha": [(["-1"], "alpha -1.0"), (["inf"], "alpha inf")],
    "params": [
        (["C=1"], "params C=1 are for an import path, svc takes c"),
        (["tree=1", "--estimator", "sklearn.svm.SVC"], "unexpected keyword argument 'tree'"),
    ],
    "cv": [(["loo"], "loo")],
    "n_folds": [
        (["1"], "n_folds 1 is below 2"),
        (["9", "--cv", "runs"], "the design has 3 run(s), cv runs needs 9"),
        (["999", "--cv", "shuffled"], "cannot be shuffled into 999 folds"),
    ],
    "scale": [(["minmax"], "minmax")],
    "scores": [
        (["f1"], "unknown score 'f1'"),
        (["r"], "score r fits none of the targets all"),
        (["accuracy", "--target", "number:rating"], "score accuracy fits none of the targets"),
    ],
    "n_permutations": [(["-1"], "n_permutations -1 is below 0"), (["1e3"], "1e3")],
    "exchange": [(["run"], "run")],
    "seed": [(["-1"], "seed -1 is below 0"), (["x"], "x")],
    "regressor": [
        (["svc", "--target", "number:rating"], "svc does not predict numbers"),
        (["lasso", "--target", "number:rating"], "unknown estimator 'lasso'"),
    ],
}  # fmt: skip

# What the spheres and their blocks add; all else is read by the class of mvpa.
LIGHT: dict[str, list[tuple[list[str], str]]] = {
    "radius_mm": [(["0"], "radius_mm 0.0 is not above 0"), (["nan"], "nan"), (["x"], "x")],
    "centres_a_block": [(["0"], "centres_a_block 0 is below 1; 256 is usual"), (["1.5"], "1.5")],
    "block_memory": [
        (["x"], "size 'x' is not a number with a unit of bytes"),
        (["0"], "block_memory '0' is 0; 256MiB is usual"),
        (["-5"], "-5"),
        (["2KiB"], "one sphere of 8 mm takes"),
    ],
    "sphere": [(["A=1,2,3"], "sphere A=1,2,3 is a region of fmri mvpa"), (["A=1,2"], "not NAME=x,y,z")],
    "weight_maps": [([], "weight_maps are of regions"), (["maybe"], "maybe")],
    "max_memory_per_process": [(["lots"], "'lots'"), (["400MiB"], "largest unit needs")],
    "labels": [(["absent.txt"], "absent.txt do not exist"), (["{data}/runs.csv"], "runs.csv")],
    "target": [
        (["cat,horse"], "class 'horse' has no sample; there are cat, dog"),
        (["number:trial_type"], "trial_type is no column of numbers"),
    ],
    "n_folds": [(["9", "--cv", "runs"], "the design has 3 run(s), cv runs needs 9"), (["1"], "below 2")],
    "scores": [(["r"], "score r fits none of the targets all"), (["f1"], "unknown score 'f1'")],
}  # fmt: skip

_CONDITIONS = ("--method", "conditions")
BETAS: dict[str, list[tuple[list[str], str]]] = {
    "method": [(["glm"], "glm")],
    "contrast": [
        (["a - b"], "contrast 'a - b' is of conditions, the method is lss; leave it out"),
        (["", *_CONDITIONS], "contrast '' is not NAME='face - house'"),
        (["d=", *_CONDITIONS], "contrast 'd=' is not NAME='face - house'"),
        (["a b=cat", "a-b=dog", *_CONDITIONS], "two would have the same files"),
        (["cat - horse", *_CONDITIONS], "'cat - horse', is not made of the design's columns: cat, dog"),
    ],
    "keep": [
        (["cow"], "unknown trial type 'cow'; nearest: "),
        (["cat", *_CONDITIONS], "keep 'cat' is of trials; leave it out"),
    ],
    "others": [(["none"], "none"), (["all", "--method", "lsa"], "others all is of lss")],
    "label_column": [(["colour"], "have no column colour; there are onset, duration, trial_type")],
    "rest": [(["cat", "dog"], "has no event but cat, dog; leave the run out")],
    "hrf": [(["gauss"], "gauss"), (["fir"], "hrf fir has no single value a trial or condition")],
    "drift": [(["wavelet"], "wavelet")],
    "drift_hz": [
        (["0"], "drift_hz 0.0 is not above 0 and finite; 0.01 is usual"),
        (["-0.01"], "drift_hz -0.01"),
        (["inf"], "drift_hz inf"),
        (["nan"], "drift_hz nan"),
        (["0.02", "--drift", "none"], "drift_hz 0.02 says nothing to drift none"),
        (["0.3"], "leave no noise"),
    ],
    "drift_order": [
        (["-1", "--drift", "polynomial"], "drift_order -1 is below 0"),
        (["2"], "drift_order 2 says nothing to drift cosine"),
        (["1.5"], "1.5"),
    ],
    "slice_time_ref": [
        (["1.5"], "slice_time_ref 1.5 is not within 0 to 1"),
        (["-0.1"], "slice_time_ref -0.1"),
        (["nan"], "slice_time_ref nan"),
    ],
    "noise": [(["ar2"], "ar2")],
    "scaling": [(["psc"], "psc")],
    "block_memory": [
        (["x"], "size 'x' is not a number with a unit of bytes"),
        (["0"], "block_memory '0' is below 1.00 MiB; 256MiB is usual"),
        (["10KiB"], "block_memory '10KiB' is below 1.00 MiB"),
    ],
    "detrend": [([], "a model removes drift"), (["maybe"], "maybe")],
    "standardize": [(["zscore_sample"], "a model removes drift"), (["z"], "z")],
    "filter": [(["cosine", "--high-pass-hz", "0.01"], "a model removes drift"), (["fir"], "fir")],
    "max_memory_per_process": [(["lots"], "'lots'"), (["400MiB"], "largest unit needs")],
}  # fmt: skip

MEMORY = ("largest unit needs", "one sphere of 8 mm takes")  # exit code 3

# Needs a process without a session of Ray: tests/cluster/test_session_address.py.
ELSEWHERE = {"address"}


def flags_of(cls: type) -> dict[str, Any]:
    """Flag of a command -> its type, nested groups flattened."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        kind: Any = hints[field.name]
        found |= flags_of(kind) if dataclasses.is_dataclass(kind) else {field.name: kind}
    return found


OWN = {"roi": SHARED | ROI, "mvpa": MVPA, "searchlight": LIGHT, "betas": BETAS}
TABLES = {
    "roi": (SHARED | ROI, flags_of(RoiConfig) | flags_of(LaunchConfig)),
    "mvpa": (SHARED | MVPA, flags_of(MvpaJobConfig) | flags_of(LaunchConfig)),
    "searchlight": (SHARED | MVPA | LIGHT, flags_of(SearchlightJobConfig) | flags_of(LaunchConfig)),
    "betas": (SHARED | BETAS, flags_of(BetasConfig) | flags_of(LaunchConfig)),
}


def switches(flags: dict[str, Any]) -> dict[str, list[tuple[list[str], str]]]:
    """Flags that take no word, or yes and no: what breaks their rule is the same for all."""
    return {
        name: [(["maybe"], "maybe")] for name, kind in flags.items() if kind in (bool, bool | None)
    }


def cases() -> list[Any]:
    found = []
    for kind, (table, flags) in TABLES.items():
        for flag, tries in (switches(flags) | table).items():
            shared = flag not in OWN[kind]  # another command's class reads them, or its parent
            for words, said in tries[:1] if shared else tries:
                name = f"{kind} {flag} {' '.join(words)}".replace("/", ":")
                found.append(pytest.param(kind, flag, words, said, id=name))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("flags") / "data").parent


@pytest.mark.parametrize("kind", TABLES)
def test_every_flag_is_tried(kind: str) -> None:
    table, flags = TABLES[kind]
    assert set(table) | set(switches(flags)) | ELSEWHERE == set(flags)


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(("kind", "flag", "words", "said"), cases())
def test_a_bad_value_is_told_in_one_line(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    flag: str,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"data": str(data), "cwd": str(tmp_path)}
    given = {"table": [f"{data}/runs.csv"], "run_dir": ["run"], "runner": ["local"]}
    given |= {"roi": [f"yes={data}/rois/yes.nii.gz"], "cache_dir": ["cache"]}
    given |= {"delay_s": ["0"]} if kind in ("mvpa", "searchlight") else {}
    given[flag] = [word.format(**places) for word in words]
    if flag.startswith("atlas"):
        del given["roi"]
    flags = [text for name, values in given.items() for text in (f"--{name}", *values)]
    code = main(["fmri", kind, *flags])
    err = capsys.readouterr().err
    last = [line for line in err.splitlines() if line.startswith("raypipe: ")]
    assert code == (3 if said in MEMORY else 2), err
    assert len(last) == 1, err
    assert "fault of raypipe" not in err
    assert "---" not in last[0]
    assert "│" not in last[0]
    assert said.format(**places) in err
    assert not (tmp_path / "run" / "units").exists() or "units failed" in last[0]
