"""Every option of `raypipe segment predict` with values that break its rule: one line, exit 2, no trace."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from predict_kit import STATED, fitted_run, predict, write_pages

from raypipe.cli import main
from raypipe.launch import LaunchConfig
from raypipe.segment.predict import SegmentPredictConfig
from raypipe.segment.predict_page import write_report

# Option -> (its words, with other flags behind them, what must be said); {d} is the folder of inputs.
BAD: dict[str, list[tuple[list[str], str]]] = {
    "run_dir": [
        (["absent"], "absent/model.json is not there; give a folder made by raypipe segment fit"),
        (["{d}/extract"], "extract/model.json is not there; give a folder made by raypipe segment"),
        (["{d}/in.tif"], "in.tif/model.json is not there; give a folder"),
        (["{d}/torn"], "torn/model.json lacks 'model'"),
        (["{d}/empty"], "empty/best holds no checkpoint (best/ or last/); train first"),
    ],
    "input": [
        (["absent.tif"], "absent.tif does not exist; give a file"),
        (["{d}"], "is a folder; give one of its files"),
        (["{d}/notes.txt"], "notes.txt is of no known format; save it as TIFF or PNG"),
        (["{d}/torn.tif"], "torn.tif"),
        (["{d}/words.npy"], "is no real number; convert the image first"),
        (["{d}/complex.npy"], "dtype complex64 is no real number"),
        (["{d}/empty.npy"], "empty.npy is not a readable .npy array"),
        (["{d}/rgb.npy"], "can be read in several ways; name its axes"),
        (["{d}/rgb.npy", "--axes", "YXC"], "has 3 channel(s), the model of {d}/run takes 1"),
        (["{d}/said.tif", "--axes", "CFYX"], "3 channel(s), the model of {d}/run takes 1; its axes were "
         "taken to be CFYX: give --axes FYX where they are so, or an image of 1"),
        (["{d}/grey.png", "--run-dir", "{d}/colour"], "has 1 channel(s), the model of {d}/colour takes 3"),
    ],
    "output": [
        (["out.png"], "name it .npy, .tif, .ome.tif or .zarr; the name says the kind"),
        (["out"], "name it .npy, .tif"),
        (["nowhere/out.tif"], "nowhere does not exist; make it, or mend the path"),
        (["{d}/in.tif/out.tif"], "folder {d}/in.tif does not exist"),
        (["{d}/in.tif"], "output {d}/in.tif is the input itself; choose another name"),
        (["{d}/in.tif", "--overwrite"], "is the input itself"),
        (["{d}/folder.tif"], "folder.tif is a folder, a .tif is a file"),
        (["{d}/folder.tif", "--overwrite"], "folder.tif is a folder"),
        (["{d}/grey.npy"], "grey.npy is there and was not written by this; move it away"),
    ],
    "what": [(["masks"], "masks")],
    "axes": [
        (["QX"], "axes 'QX': name each once, of F C Z Y X"),
        (["YX"], "axes 'YX' do not fit an array of shape (2, 300, 280)"),
        (["ZYX"], "Z makes volumes; name it F"),
        (["CYX", "--input", "{d}/grey.png"], "leave them out for a Picture"),
        (["FCYX", "--input", "{d}/said.tif"], "not those of said.tif, which says CTYX (3 x 2 x 64 x 64)"),
    ],
    "checkpoint": [
        (["first"], "first"),
        (["last"], "run/last holds no checkpoint"),
        (["best", "--run-dir", "{d}/early"], "these weights have no tuned threshold"),
    ],
    "report_dir": [
        (["{d}/in.tif"], "in.tif is no folder that can be written; give another --report-dir"),
        (["{d}/extract"], "extract holds the record of extract; give another --report-dir"),
        (["{d}/other"], "other holds the record of /elsewhere/out.tif; give another"),
        (["out.zarr", "--output", "out.zarr"], "lies in the output itself"),
    ],
    "chunk_size": [
        (["0"], "chunk_size 0, batch 1: both must be at least 1"),
        (["-5"], "chunk_size -5"),
        (["1.5"], "1.5"),
        (["large"], "large"),
    ],
    "batch": [(["0"], "batch 0"), (["-1"], "batch -1"), (["x"], "x")],
    "halo": [
        (["8", "--align", "None"], "state both, or neither"),
        (["-8", "--align", "4"], "halo -8 is not 2 numbers of pixels"),
        (["8", "8", "8", "--align", "4"], "halo (8, 8, 8) is not 2 numbers of pixels"),
    ],
    "align": [(["0", "--halo", "8"], "align 0 is not 2 numbers"), (["x", "--halo", "8"], "x")],
    "blend": [(["cosine"], "cosine")],
    "overlap": [
        (["0", "--blend", "linear"], "overlap 0: blending needs 1 pixel or more"),
        (["40", "--blend", "linear"], "overlap 40 with tiles of 64: it must be from 1 to half a tile"),
    ],
    "device": [(["tpu"], "tpu"), (["cuda"], "--device cuda: torch finds no GPU here")],
    "workers": [
        (["0"], "workers 0 is below 1"),
        (["two"], "two"),
        (["2"], "--workers 2 needs --runner ray"),
    ],
    "runner": [(["dask"], "dask")],
    "max_memory_per_process": [
        (["lots"], "max_memory_per_process 'lots'"),
        (["0"], "must be above 0"),
    ],
    "memmap_threshold": [(["x"], "memmap_threshold 'x'")],
    "available_memory_buffer": [(["1.5"], "available_memory_buffer 1.5"), (["x"], "x")],
}  # fmt: skip

SWITCHES = {
    "overwrite", "dry_run", "verbose", "use_memmap", "shared_memory_parallel", "cleanup_temp_files",
    "monitor_memory_usage",
}  # fmt: skip
ELSEWHERE = {"address"}  # what Ray says of it is tests/cluster's


def options(cls: type) -> set[str]:
    """Option names, nested groups flattened."""
    found: set[str] = set()
    for name, kind in typing.get_type_hints(cls).items():
        if name in {f.name for f in dataclasses.fields(cls)}:
            nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
            found |= options(kind) if nested else {name}
    return found


def test_every_option_is_tried() -> None:
    assert set(BAD) | SWITCHES | ELSEWHERE == options(SegmentPredictConfig) | options(LaunchConfig)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs and images, good and bad."""
    d = tmp_path_factory.mktemp("predict-flags")
    fitted_run(d / "run")
    fitted_run(d / "colour", in_channels=3)
    write_pages(d / "in.tif")
    (d / "torn.tif").write_bytes((d / "in.tif").read_bytes()[:40])
    (d / "notes.txt").write_text("no picture")
    Image.fromarray(np.zeros((80, 80), np.uint8)).save(d / "grey.png")
    arrays = {
        "rgb": np.zeros((64, 64, 3), np.uint8),
        "words": np.array([["a"]]),
        "complex": np.zeros((64, 64), np.complex64),
        "grey": np.zeros((64, 64), np.uint8),
    }
    pages = np.zeros((3, 2, 64, 64), np.uint8)
    tifffile.imwrite(d / "said.tif", pages, ome=True, metadata={"axes": "CTYX"})
    for name, array in arrays.items():
        np.save(d / f"{name}.npy", array)
    (d / "empty.npy").touch()
    for name in ("folder.tif", "extract", "torn", "empty", "other"):
        (d / name).mkdir()
    (d / "extract" / "run.json").write_text('{"kind": "extract"}')
    (d / "torn" / "model.json").write_text("{}")
    (d / "empty" / "model.json").write_bytes((d / "run" / "model.json").read_bytes())
    other = {"kind": "segment predict", "output": {"path": "/elsewhere/out.tif"}}
    (d / "other" / "run.json").write_text(json.dumps(other))
    early = fitted_run(d / "early") / "best" / "meta.json"
    meta = json.loads(early.read_text())
    early.write_text(json.dumps(meta | {"progress": {"history": []}}))
    return d


CASES = [(option, words, said) for option, cases in BAD.items() for words, said in cases]


@pytest.mark.parametrize(
    ("option", "words", "said"), CASES, ids=[f"{o} {' '.join(w)}" for o, w, _ in CASES]
)
def test_a_bad_value_is_one_line_and_2(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(inputs.rglob("*"))
    good: dict[str, Any] = {"--run-dir": inputs / "run", "--input": inputs / "in.tif"}
    good |= {"--output": "out.tif", "--runner": "local", "--device": "cpu", "--chunk-size": "64"}
    good |= dict([STATED[:2], STATED[2:]])
    given = [word.replace("{d}", str(inputs)) for word in words]
    flag = f"--{option.replace('_', '-')}"
    named = {flag, *(word for word in given if word.startswith("--"))}
    if {"--halo", "--align", "--blend"} & named:
        good = {k: v for k, v in good.items() if k not in STATED}
    rest = [str(w) for pair in good.items() if pair[0] not in named for w in pair]
    assert main(["segment", "predict", flag, *given, *rest]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("raypipe: ")]
    assert len(lines) == 1 and "Traceback" not in err and "fault of raypipe" not in err
    assert said.replace("{d}", str(inputs)) in lines[0]
    assert list(tmp_path.iterdir()) == [], "what is refused leaves nothing behind"
    assert sorted(inputs.rglob("*")) == before


def test_a_result_of_pages_goes_on_by_the_command_that_began_it(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of one channel takes each page of a file that has channels for an image, as it always did."""
    run = inputs / "run", inputs / "said.tif", tmp_path / "out.npy", *STATED
    said = "the file says CTYX, taken as FYX"
    assert predict(*run, "--dry-run") == 0
    told = capsys.readouterr().out.splitlines()[0]
    assert "axes taken to be FYX" in told and f"{said} as the model takes 1 channel(s)" in told
    assert predict(*run) == 0
    got = capsys.readouterr()
    lines = [line for line in got.err.splitlines() if said in line]
    assert len(lines) == 1 and "(6, 64, 64)" in got.out
    record = json.loads((tmp_path / "out.npy.predict/run.json").read_text())
    assert record["input"]["axes"] == "FYX" and said in record["input"]["axes_note"]
    page = write_report(tmp_path / "out.npy.predict").read_text()
    assert f"Axes: {said} as the model takes 1 channel(s); where that is wrong" in page
    for axes in ([], ["--axes", "FYX"], ["--axes", "FFYX"]):
        assert predict(*run, *axes) == 0
        assert "complete already" in capsys.readouterr().out


def test_axes_of_a_picture_are_those_that_it_has(inputs: Path, tmp_path: Path) -> None:
    """So its page has no note on them, nor has that of a record of before there were notes."""
    args = inputs / "run", inputs / "grey.png", tmp_path / "out.npy", *STATED
    assert predict(*args, "--axes", "YX") == 0
    folder = tmp_path / "out.npy.predict"
    assert "Axes: " not in write_report(folder).read_text()
    record = json.loads((folder / "run.json").read_text())
    del record["input"]["axes_note"]
    (folder / "run.json").write_text(json.dumps(record))
    assert "Axes: " not in write_report(folder).read_text()


def test_a_folder_that_cannot_be_written_is_refused(
    inputs: Path, mount: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = mount("tmpfs", "size=1m,ro")
    args = inputs / "run", inputs / "in.tif", place / "out.tif", *STATED
    assert predict(*args) == 2
    assert f"folder {place} cannot be written" in capsys.readouterr().err


def test_a_tile_larger_than_the_image_is_the_image(inputs: Path, tmp_path: Path) -> None:
    for chunk, out in (("1000000000", tmp_path / "one.npy"), ("64", tmp_path / "many.npy")):
        args = inputs / "run", inputs / "in.tif", out, *STATED, "--what", "logits"
        assert predict(*args, "--chunk-size", chunk) == 0
    one, many = np.load(tmp_path / "one.npy"), np.load(tmp_path / "many.npy")
    np.testing.assert_allclose(one, many, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "one.npy.tiles.json").read_text())["identity"]["tile"][0] == 10**9


def test_a_tile_that_no_worker_can_hold_is_refused_before_the_first(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """20000 x 20000 pixels in a sparse file: 1.5 GiB as float32, before the network has begun."""
    huge = np.lib.format.open_memmap(tmp_path / "in.npy", "w+", np.uint8, (20000, 20000))
    huge.flush()
    args = [inputs / "run", tmp_path / "in.npy", tmp_path / "out.tif", *STATED]
    args += ["--max-memory-per-process", "4GiB"]
    assert predict(*args, "--chunk-size", "1000000") == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert "chunk_size 1000000: one window of 20000x20000 pixels needs" in line
    chunk = line.partition("take --chunk-size ")[2].partition(",")[0]
    assert predict(*args, "--chunk-size", chunk, "--dry-run") == 0
    share = int(capsys.readouterr().out.partition("% of its budget")[0].split()[-1])
    assert 10 < share < 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy"]
