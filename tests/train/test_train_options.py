"""TrainConfig's rules, the learning rate against torch's schedulers, the table of settings."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from train_helpers import config

from raypipe.errors import ConfigError
from raypipe.train import TrainConfig, settings_table
from raypipe.train.precision import format_table
from raypipe.train.schedule import learning_rate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("epochs", "batch_size", "accumulate", "step_size", "keep")),
        *((name, -1) for name in ("warmup_steps", "seed", "shuffle_window")),
        ("checkpoint_every_steps", -1),
        *((name, v) for name in ("lr", "init_scale") for v in (0.0, -1.0, math.nan, math.inf)),
        *(("checkpoint_every_s", v) for v in (-1.0, math.nan, math.inf)),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        *(("gamma", v) for v in (0.0, 1.5, math.nan)),
        *(("clip_norm", v) for v in (0.0, -1.0, math.inf, math.nan)),
        ("schedule", "linear"),
        ("amp", "fp8"),
    ],
)
def test_a_value_that_breaks_its_rule_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**{name: value})


def test_the_defaults_are_whole_and_frozen_and_travel() -> None:
    cfg = TrainConfig()
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 1.0  # type: ignore[misc]
    assert TrainConfig(batch_size=3, accumulate=4).rows_per_step(5) == 60


def torch_rates(kind: str, cfg: TrainConfig, per_epoch: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.lr)
    total = cfg.epochs * per_epoch
    scheduler: Any
    if kind == "step":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, cfg.step_size, cfg.gamma)
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    rates = []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if kind == "cosine" or (step + 1) % per_epoch == 0:
            scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["step", "cosine"])
def test_rates_equal_torchs_schedulers(kind: Any) -> None:
    cfg = config(schedule=kind, epochs=7, step_size=2, gamma=0.3)
    ours = [learning_rate(cfg, step, 5) for step in range(35)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours == pytest.approx(torch_rates(kind, cfg, 5), rel=1e-9)


def test_warm_up_rises_linearly_and_the_cosine_starts_after_it() -> None:
    cfg = config(schedule="constant", warmup_steps=4, lr=1.0)
    assert [learning_rate(cfg, s, 9) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = config(schedule="cosine", warmup_steps=4, lr=1.0, epochs=2)
    rates = [learning_rate(cosine, s, 6) for s in range(13)]
    assert rates[3] == rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0)


def test_the_recipe_holds_what_resuming_must_share() -> None:
    cfg = config()
    same = config(batch_size=4, accumulate=2, checkpointing=True, keep=5, epochs=9)
    assert cfg.recipe() == config(checkpoint_every_s=1.0, checkpoint_every_steps=3).recipe()
    assert cfg.recipe() == same.recipe()
    for change in ({"lr": 1.0}, {"seed": 1}, {"amp": "bf16"}, {"gamma": 0.9}, {"clip_norm": None}):
        assert config(**change).recipe() != cfg.recipe()
    cosines = [config(schedule="cosine", epochs=epochs).recipe() for epochs in (3, 4)]
    assert cosines[0] != cosines[1]


def test_the_table_names_every_technique() -> None:
    cfg = config(amp="fp16", checkpointing=True, use_reentrant=True, channels_last=True)
    rows = settings_table(cfg, world=2, device="cuda:0", n_train=43, n_val=7, rows_per_step=16)
    text = format_table(rows)
    for word in (
        "2 on cuda:0, DDP",
        "fp16",
        "65536",
        "reentrant",
        "channels_last",
        "3 steps",
        "10 min",
    ):
        assert word in text
    assert {line[:17][-2:] for line in text.splitlines()} == {"  "}  # the values begin in line


def test_importing_the_options_brings_no_torch() -> None:
    code = "import sys, raypipe.train; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
