"""Fit for real, in this process: files, the choice of epoch, stopping and going on, refusals."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_runs import TRAIN, config, losses, records

from raypipe.cli import main
from raypipe.errors import ConfigError, Interrupted, MemoryBudgetExceeded
from raypipe.runner import LocalRunner
from raypipe.segment.config import NetworkConfig
from raypipe.segment.loss import LossConfig
from raypipe.segment.prepare import prepare
from raypipe.segment.run import fit
from raypipe.segment.saved import load_model
from raypipe.segment.task import SegmentTask
from raypipe.train import stop
from raypipe.train.limit import BatchLimit


def test_the_best_epoch_is_that_of_the_highest_dice(fitted: Path) -> None:
    epochs = records(fitted, "epoch")
    assert len(epochs) == 3
    best = max(epochs, key=lambda record: record["val_dice"])
    run = json.loads((fitted / "run.json").read_text())
    assert run["result"]["best_epoch"] == best["epoch"]
    assert run["result"]["best_val_dice"] == best["val_dice"]
    module, saved = load_model(fitted)
    assert (saved.epoch, saved.threshold) == (best["epoch"], best["val_threshold"])
    assert not module.training and saved.spec.width == 4 and saved.multiple == 4
    assert load_model(fitted, "last")[1].epoch == 2
    losses_ = losses(fitted)
    assert np.mean(losses_[-3:]) < losses_[0]
    assert (fitted / "report.html").stat().st_size > 20_000


@pytest.mark.usefixtures("no_page")
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    fitted: Path, nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def wished(run_dir: Path) -> bool:
        asked.append(1)
        return len(asked) == 5

    cfg = config(nuclei, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(stop, "stop_wished", wished)
        with pytest.raises(Interrupted, match="stopped after"):
            fit(cfg, LocalRunner())
    done = len(losses(cfg.run_dir))
    per_epoch = len(losses(fitted)) // 3
    assert 0 < done < len(losses(fitted)) and done % per_epoch, "it stopped between two epochs"
    fit(cfg, LocalRunner())
    assert losses(cfg.run_dir) == losses(fitted)
    weights = [load_model(run)[0].state_dict() for run in (cfg.run_dir, fitted)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.usefixtures("no_page")
def test_a_run_out_of_budget_ends_with_3_and_goes_on(
    fitted: Path, nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls: list[int] = []

    def at_boundary(self: BatchLimit) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise MemoryBudgetExceeded("train holds 9 GiB of its budget of 8 GiB")

    flags = [
        *(
            "segment",
            "fit",
            "--data",
            str(nuclei),
            "--run-dir",
            str(tmp_path / "run"),
            "--crop",
            "32",
        ),
        *("--width", "4", "--depth", "3", "--epochs", "3", "--batch-size", "4", "--lr", "3e-3"),
        *("--schedule", "constant", "--device", "cpu", "--runner", "local"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(BatchLimit, "at_boundary", at_boundary)
        assert main(flags) == 3
    assert "budget of 8 GiB" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 5 and (tmp_path / "run/last/meta.json").is_file()
    assert main(flags) == 0
    assert losses(tmp_path / "run") == losses(fitted)


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("ema_decay", "stop_at", "epoch", "tuned"),
    [(None, None, 1, True), (0.9, None, 1, False), (None, 6, 1, False)],
)
def test_a_threshold_belongs_to_the_weights_it_was_tuned_on(
    nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ema_decay: float | None, stop_at: int | None, epoch: int, tuned: bool,
) -> None:  # fmt: skip
    """Averaged weights are judged and saved as the best; the last are plain, or went on."""
    asked: list[int] = []

    def wished(run_dir: Path) -> bool:
        asked.append(1)
        return len(asked) == stop_at

    cfg = config(nuclei, tmp_path / "run", train=replace(TRAIN, epochs=2, ema_decay=ema_decay))
    monkeypatch.setattr(stop, "stop_wished", wished)
    with pytest.raises(Interrupted) if stop_at else nullcontext():
        fit(cfg, LocalRunner())
    epochs = records(cfg.run_dir, "epoch")
    assert len(epochs) == (1 if stop_at else 2)
    last, best = (load_model(cfg.run_dir, name)[1] for name in ("last", "best"))
    assert (last.epoch, last.threshold) == (epoch, epochs[-1]["val_threshold"] if tuned else None)
    assert best.epoch is not None and best.threshold == epochs[best.epoch]["val_threshold"]


def test_weights_that_no_validation_has_seen_are_of_the_epoch_they_were_trained_in(
    fitted: Path, tmp_path: Path
) -> None:
    shutil.copytree(fitted, tmp_path / "run")
    path = tmp_path / "run/last/meta.json"
    meta = json.loads(path.read_text())
    meta |= {"judged": False}
    meta["progress"] |= {"history": [], "step": 0, "owes_validation": True}
    path.write_text(json.dumps(meta))
    last = load_model(tmp_path / "run", "last")[1]
    assert (last.epoch, last.threshold) == (0, None)


@pytest.mark.usefixtures("no_page")
def test_a_full_device_in_validation_costs_no_step(
    nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch's: `last` has gone on from what the first one judged, and has no threshold."""
    train = replace(TRAIN, epochs=2)
    cfg = config(nuclei, tmp_path / "run", train=train)
    with monkeypatch.context() as patched:

        def full(self: SegmentTask, model: Any, batch: Any) -> Any:
            if (cfg.run_dir / "best").exists():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return real(self, model, batch)

        real = SegmentTask.val_sums
        patched.setattr(SegmentTask, "val_sums", full)
        with pytest.raises(MemoryBudgetExceeded, match="one row at once is too many"):
            fit(cfg, LocalRunner())
    last = load_model(cfg.run_dir, "last")[1]
    assert (last.epoch, last.threshold) == (1, None)
    steps = len(losses(cfg.run_dir))
    whole = config(nuclei, tmp_path / "whole", train=train)
    for one in (cfg, whole):
        fit(one, LocalRunner())
    assert losses(cfg.run_dir) == losses(whole.run_dir) and len(losses(cfg.run_dir)) == steps
    ours, theirs = (records(one.run_dir, "epoch")[1]["val_loss"] for one in (cfg, whole))
    assert ours == theirs


@pytest.mark.usefixtures("no_page")
def test_other_data_in_the_folder_are_refused(fitted: Path, nuclei: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run of other normalisation"):
        fit(config(nuclei, fitted, inputs={"normalise": "minmax"}), LocalRunner())
    with pytest.raises(ConfigError, match="holds a run of other model"):
        fit(config(nuclei, fitted, network=NetworkConfig(width=8, depth=3)), LocalRunner())
    again = fit(config(nuclei, fitted), LocalRunner())
    assert again.result is not None and again.result.epochs == 3, "complete already"


@pytest.mark.usefixtures("no_page")
def test_averaging_and_accumulation_change_no_step(nuclei: Path, tmp_path: Path) -> None:
    """2 x 2 rows see the same crops as 4; batch norm alone tells them apart, so only a little."""
    whole = replace(TRAIN, epochs=1)
    halves = replace(whole, batch_size=2, accumulate=2, channels_last=True, ema_decay=0.9)
    for name, train in (("whole", whole), ("halves", halves)):
        fit(config(nuclei, tmp_path / name, train=train), LocalRunner())
    one, other = (losses(tmp_path / name) for name in ("whole", "halves"))
    assert len(one) == len(other)
    np.testing.assert_allclose(one[0], other[0], rtol=0.05)


def test_a_dry_run_writes_nothing(
    nuclei: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = replace(TRAIN, predict_memory=False)
    fit(config(nuclei, tmp_path / "run", train=train, dry_run=True), None)
    told = capsys.readouterr().out
    assert "3 pictures to train, 1 to validate, 2 to test" in told and "disk" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--crop", "30"], "crop 30 is no multiple of 4"),
        (["--target", "classes", "--classes", "2"], "classes are 0 to 1"),
        (["--model", "vnet"], "unknown model 'vnet'"),
        (["--gain", "2"], "gain=2.0"),
        (["--data", "/nowhere"], "neither a folder nor a table"),
        (["--schedule", "sometimes"], "schedule"),
    ],
)
def test_bad_input_is_one_line_and_2(
    nuclei: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(nuclei), "--crop", "32", "--depth", "3"]
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        if name in given:
            given[given.index(name) + 1] = value
        else:
            given += [name, value]
    args = ["segment", "fit", "--run-dir", str(tmp_path / "r"), "--runner", "local", *given]
    assert main(args) == 2
    told = capsys.readouterr().err.splitlines()
    said_so = [line for line in told if line.startswith("raypipe: ")]
    assert len(said_so) == 1 and said in said_so[0] and told[-1] == said_so[0]
    assert not (tmp_path / "r").exists()


def test_normalisation_and_digest_see_only_what_is_used(nuclei: Path, tmp_path: Path) -> None:
    ready = prepare(config(nuclei, tmp_path))
    assert ready.task.n_train == 3 * round(70 * 70 / 32**2) and len(ready.task.val_rows) == 9
    assert ready.task.crops.n_rows > 10**9


@pytest.mark.parametrize(
    ("target", "changes", "said"),
    [
        (
            "foreground",
            {"loss": {"class_weights": (1.0, 2.0)}},
            r"class_weights=\(1.0, 2.0\).*one map",
        ),
        ("foreground", {"loss": {"dice_background": True}}, "dice_background=True.*one map"),
        ("classes", {"loss": {"positive_weight": 2.0}}, "positive_weight=2.0.*3 classes"),
        ("boundary", {"loss": {"positive_weight": 2.0}}, "positive_weight=2.0.*3 classes"),
        ("classes", {"loss": {"class_weights": (1.0, 2.0)}}, "2 weights for 3 classes"),
        ("foreground", {"network": {"width": 32}}, "width 32 with model smp"),
        ("foreground", {"network": {"depth": 4}}, "depth 4 with model smp"),
        ("foreground", {"network": {"up": "bilinear"}}, "up bilinear with model smp"),
        ("foreground", {"network": {"dropout": 0.1}}, "dropout 0.1 with model smp"),
        ("classes", {"inputs": {"classes": 40_000}}, "classes 40000"),
    ],
)
def test_what_would_be_ignored_is_refused_before_anything_is_read(
    tmp_path: Path, target: str, changes: dict[str, Any], said: str
) -> None:
    """There are no data, and no folder is made."""
    inputs = {"target": target, "classes": 3, **changes.get("inputs", {})}
    with pytest.raises(ConfigError, match=said) as refused:
        given = {name: make(**changes[name]) for name, make in MAKERS.items() if name in changes}
        config(tmp_path / "none", tmp_path / "run", inputs=inputs, **given)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_what_does_apply_is_taken(tmp_path: Path) -> None:
    weights = {"class_weights": (1.0, 2.0, 3.0), "dice_background": True}
    for target, loss in [
        ("boundary", weights),
        ("classes", weights),
        ("foreground", {"positive_weight": 2.0}),
    ]:
        config(tmp_path, tmp_path, inputs={"target": target, "classes": 3}, loss=LossConfig(**loss))
    NetworkConfig(model="smp:Unet:resnet18")


def smp(**sizes: Any) -> NetworkConfig:
    return NetworkConfig(model="smp:Unet:resnet18", **sizes)


MAKERS = {"loss": LossConfig, "network": smp}
