"""`raypipe segment predict --dry-run` says what then happens, and leaves nothing; and what a run leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from predict_kit import STATED, TILES, arguments, fitted_run, predict, recorded, write_pages

from raypipe.cli import main
from raypipe.memory.config import resolve
from raypipe.runner import LocalRunner, Machines, Prospect, Runner
from raypipe.segment import predict_plan
from raypipe.segment.predict import SegmentPredictConfig, after_of
from raypipe.segment.saved import load_model
from raypipe.tile import TileConfig, measure
from raypipe.tile.worker import TileWorker
from raypipe.train import checkpoint


@pytest.fixture
def given(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(run folder, pages, output)."""
    write_pages(tmp_path / "in.tif")
    (tmp_path / "results").mkdir()
    return fitted_run(tmp_path / "run"), tmp_path / "in.tif", tmp_path / "results" / "out.ome.tif"


def told(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, str]:
    """First word of each line of a dry run -> the rest."""
    capsys.readouterr()
    assert predict(*args, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop() == "dry run: nothing was computed or written"
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def states(folder: Path) -> list[tuple[str, int]]:
    """Names and times of change of all below."""
    return sorted((str(path), path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")])


def end_after(monkeypatch: pytest.MonkeyPatch, items: int) -> None:
    """Have the worker fail at the item after ``items``."""
    step, done = TileWorker.step, []

    def limited(self: TileWorker, *args: object) -> object:
        if len(done) == items:
            self.drain()
            raise RuntimeError("ended by the test")
        done.append(1)
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(TileWorker, "step", limited)


def test_what_it_says_is_what_happens(
    given: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _, out = given
    before = states(out.parents[1])
    said = told(capsys, *given)
    assert states(out.parents[1]) == before
    module, saved = load_model(run_dir)
    field = measure(module, 1)
    assert f"radius {field.radius[0]} x {field.radius[1]}, align 4 x 4" in said["network"]
    assert "measured in" in said["network"] and "on cpu" in said["network"]
    assert "2 image(s) of 300x280, 1 channel(s), uint8; TIFF of axes" in said["input"]
    assert "2 page(s) in 1 file(s), read by pages" in said["input"]
    assert f"threshold {saved.threshold:.3g}" in said["model"] and "epoch 4" in said["model"]
    window = 64 + 2 * field.halo[0]
    assert f"{TILES} of 64 x 64 pixels, 5 x 5 an image" in said["tiles"]
    assert f"halo {field.halo[0]} x {field.halo[1]}, read as {window} x {window}" in said["tiles"]
    assert said["kept"] == "none" and said["workers"] == "1 on cpu, local"
    assert "% of its budget" in said["memory"] and "GiB are free" in said["disk"]
    assert predict(*given) == 0
    exactly = re.search(r"exactly (\d+) bytes", said["disk"])
    assert exactly and out.stat().st_size == int(exactly[1])


def test_it_knows_what_an_earlier_run_measured_and_kept(
    given: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = given[2]
    with monkeypatch.context() as patch:
        end_after(patch, 2)
        assert predict(*given) == 4
    done = recorded(out)
    assert 0 < done < TILES
    before = states(out.parents[1])
    with monkeypatch.context() as patch:
        patch.setattr("raypipe.tile.plan.measure", None)  # it is not measured again
        said = told(capsys, *given)
    assert said["network"].endswith("measured by the earlier run of this output")
    assert f"{done} of {TILES} tiles of an earlier run" in said["kept"]
    assert states(out.parents[1]) == before
    assert predict(*given) == 0
    said = told(capsys, *given)
    assert said["kept"].startswith(f"all {TILES} tiles: finished already")
    assert "there already" in said["disk"]
    assert told(capsys, *given, "--overwrite")["kept"] == "none"
    assert predict(*given, "--what", "logits", "--dry-run") == 2  # as the run would


def test_a_stated_field_is_not_measured(
    given: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raypipe.tile.plan.measure", None)
    said = told(capsys, *given, *STATED)
    assert said["network"] == "radius 24 x 24, align 4 x 4 pixels, stated"


def test_it_starts_no_ray(given: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    args = arguments(*given, *STATED, "--dry-run", "--workers", "2")
    args[args.index("local")] = "ray"
    code = (
        f"import sys; from raypipe.cli import main; code = main({args!r})\n"
        "assert not ('ray' in sys.modules and sys.modules['ray'].is_initialized()), 'Ray was started'\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "workers  2 on cpu, ray" in done.stdout


def test_a_run_leaves_what_made_it(given: tuple[Path, Path, Path]) -> None:
    run_dir, pages, out = given
    assert predict(*given) == 0
    folder = out.with_name("out.ome.tif.predict")
    record = json.loads((folder / "run.json").read_text())
    file = record["input"]["files"][0]
    assert file["path"] == str(pages) and file["bytes"] == pages.stat().st_size
    assert record["input"]["space"] == [300, 280] and record["input"]["dtype"] == "uint8"
    assert record["model"]["threshold"] == load_model(run_dir)[1].threshold
    weights = xxhash.xxh3_128_hexdigest((run_dir / "best" / "model.pt").read_bytes())
    assert record["model"]["files"]["model.pt"]["xxh3_128"] == weights
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["tiles"]["all"] == record["result"]["tiles"] == TILES
    assert record["tiles"]["field"]["how"] == "measured"
    assert record["config"]["tile"]["chunk_size"] == 64
    assert record["output"]["bytes"] == out.stat().st_size
    assert record["result"]["seconds"] > 0 and record["earlier"] == []
    log = (folder / "memory" / "worker.csv").read_text().splitlines()
    column = log[0].split(",").index("charge_peak_bytes")
    peak = max(int(line.split(",")[column]) for line in log[1:])
    assert record["result"]["peak_bytes"] == {"worker": peak}
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for words in ("out.ome.tif", str(pages), weights, "Peak memory of a process", "2 × 300 × 280"):
        assert words in page


def test_the_record_is_of_the_weights_that_were_loaded(
    given: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that still runs replaces its best weights meanwhile; and they are read once, which takes long."""
    run_dir, _, out = given
    weights = xxhash.xxh3_128_hexdigest((run_dir / "best" / "model.pt").read_bytes())
    seen: list[Path] = []
    inspect, plan = checkpoint._inspect, predict_plan.make_plan

    def inspected(path: Path) -> object:
        seen.append(path)
        return inspect(path)

    def meanwhile(*args: object, **options: object) -> object:
        checkpoint.save(run_dir, "best", {"model": {}}, {"progress": {}})
        return plan(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "_inspect", inspected)
    monkeypatch.setattr(predict_plan, "make_plan", meanwhile)
    assert predict(*given, *STATED) == 0
    record = json.loads((out.with_name("out.ome.tif.predict") / "run.json").read_text())
    assert record["model"]["files"]["model.pt"]["xxh3_128"] == weights
    assert seen == [run_dir / "best"]


def test_the_record_is_not_needed_and_not_replaced(given: tuple[Path, Path, Path]) -> None:
    out = given[2]
    assert predict(*given, *STATED) == 0
    folder = out.with_name("out.ome.tif.predict")
    before = (folder / "run.json").read_bytes()
    assert predict(*given, *STATED) == 0  # finished: it makes nothing
    assert (folder / "run.json").read_bytes() == before
    shutil.rmtree(folder)
    assert predict(*given, *STATED) == 0
    assert not folder.exists()


def test_a_record_of_another_result_is_left_alone(given: tuple[Path, Path, Path]) -> None:
    """Of a run that ended before its result, which another command then made."""
    assert predict(*given, *STATED) == 0
    path = given[2].with_name("out.ome.tif.predict") / "run.json"
    fields = json.loads(path.read_text())
    fields["identity"]["model"], fields["result"] = "another", None
    path.write_text(json.dumps(fields))
    assert predict(*given, *STATED) == 0
    assert json.loads(path.read_text())["result"] is None


def test_a_finished_result_in_an_archive_is_complete(
    given: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Root may write everywhere but on a disk that is mounted so: what it may is taken from it here."""
    folder, access = given[2].parent, os.access

    def archived(path: str | Path, mode: int, **more: bool) -> bool:
        inside = folder in (Path(path), *Path(path).parents)
        return access(path, mode, **more) and not (inside and mode & os.W_OK)

    def refused(*more: str) -> str:
        assert predict(*given, *STATED, *more) == 2
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", archived)
        assert f"folder {folder} cannot be written" in refused()
    assert predict(*given, *STATED) == 0
    path = given[2].with_name("out.ome.tif.predict") / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "result": None}))
    before = states(folder)
    monkeypatch.setattr(os, "access", archived)
    capsys.readouterr()
    assert predict(*given, *STATED) == 0
    assert "complete already" in capsys.readouterr().out
    assert "finished already" in told(capsys, *given, *STATED)["kept"]
    assert "begun with other" in refused("--what", "logits")
    assert "cannot be written" in refused("--overwrite")
    assert states(folder) == before


def test_an_unfinished_result_may_be_moved_with_its_record(
    given: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, pages, out = given
    with monkeypatch.context() as patch:
        end_after(patch, 1)
        assert predict(*given, *STATED) == 4
    done = recorded(out)
    moved = out.parent.rename(tmp_path / "moved") / out.name
    assert predict(run_dir, pages, moved, *STATED) == 0
    record = json.loads((tmp_path / "moved" / f"{out.name}.predict" / "run.json").read_text())
    assert record["output"]["path"] == str(moved) and record["kept"] == done > 0
    assert record["earlier"][0]["output"]["path"] == str(out)


def test_a_run_killed_before_it_could_say_so_is_recorded_as_complete(
    given: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    args = *given, *STATED, "--report-dir", folder
    assert predict(*args) == 0
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "result": None}))
    assert predict(*args) == 0
    result = json.loads((folder / "run.json").read_text())["result"]
    assert result["tiles"] == 0 and result["kept"] == TILES and result["seconds"] is None


def test_each_run_that_made_tiles_is_kept(
    given: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for items in (1, 2):
        with monkeypatch.context() as patch:
            end_after(patch, items)
            assert predict(*given, *STATED) == 4
    assert predict(*given, *STATED) == 0
    folder = given[2].with_name("out.ome.tif.predict")
    record = json.loads((folder / "run.json").read_text())
    kept = [one["kept"] for one in record["earlier"]]
    assert kept[0] == 0 < kept[1] < record["kept"]
    assert predict(*given, *STATED, "--overwrite") == 0
    assert json.loads((folder / "run.json").read_text())["earlier"] == []


@pytest.mark.parametrize("where", ["here", "ray"])
def test_the_network_is_measured_on_the_device_of_its_own_process(
    given: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """ "meta" stands for a GPU: what matters is where the weights lie when they are measured."""
    seen: list[str] = []

    def plan(source: object, module: torch.nn.Module, *_: object, **__: object) -> None:
        seen.append(next(module.parameters()).device.type)

    monkeypatch.setattr(predict_plan, "make_plan", plan)
    monkeypatch.setattr(predict_plan, "_field_words", lambda *_, **__: "")
    cfg = SegmentPredictConfig(run_dir=given[0], input=given[1], output=given[2])
    memory = resolve()
    runner: Runner | Prospect = LocalRunner(memory)
    if where == "ray":
        runner = Prospect(memory=memory, machines=Machines(nodes=(("", 2),)))
    predict_plan.make_ready(cfg, runner, "meta", after_of)
    assert seen == ["meta" if where == "here" else "cpu"]


def test_the_identity_of_results_that_are_there_stays(given: tuple[Path, Path, Path]) -> None:
    """Where the classes lie is part of it: moving them would orphan every unfinished result."""
    assert after_of("labels", load_model(given[0])[1]).__class__.__module__ == (
        "raypipe.segment.predict"
    )
    assert predict(*given, *STATED) == 0
    fields = json.loads(given[2].with_name("out.ome.tif.tiles.json").read_text())
    wanted = {"input", "model", "prepare", "after", "output", "tile", "halo", "align", "blend"}
    assert set(fields["identity"]) == wanted


def test_another_chunk_size_is_another_result_of_the_same_values(
    given: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    made = []
    for chunk in ("64", "112"):
        out = tmp_path / f"{chunk}.npy"
        assert predict(*given[:2], out, *STATED, "--chunk-size", chunk) == 0
        made.append(np.load(out))
    assert np.array_equal(*made) and made[0].shape == (2, 300, 280)


def test_options_keep_their_defaults() -> None:
    """A record names them; a default that moved would tell another story of the same command."""
    fields = {f.name: f.default for f in dataclasses.fields(TileConfig)}
    assert fields["chunk_size"] == 512 and fields["batch"] == 1 and fields["halo"] is None
