"""Averaged weights: against a loop in plain numbers, in validation, in checkpoints, after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from train_helpers import ToyTask, config, losses, records, run

from raypipe.errors import ConfigError
from raypipe.train import TrainConfig, load_model_state
from raypipe.train.checkpoint import newest
from raypipe.train.ema import WeightAverage


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_the_average_equals_a_loop_over_numbers() -> None:
    model, rng = small(), np.random.default_rng(0)
    average = WeightAverage(model, 0.9)
    expected = {k: v.numpy().copy().astype(float) for k, v in model.state_dict().items()}
    for n in range(25):
        for value in model.state_dict().values():
            value.copy_(torch.as_tensor(10 * rng.normal(size=value.shape)))
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                expected[name] = value.numpy().copy()
            else:
                expected[name] = decay * expected[name] + (1 - decay) * value.double().numpy()
    live = {k: v.clone() for k, v in model.state_dict().items()}
    with average.applied():
        for name, value in model.state_dict().items():
            assert np.allclose(value.numpy(), expected[name], rtol=1e-4, atol=1e-5), name
            assert value.dtype == live[name].dtype
    for name, value in model.state_dict().items():
        assert torch.equal(value, live[name]), "the model has its own weights again"


def test_the_own_weights_come_back_after_an_error() -> None:
    model = small()
    average, own = WeightAverage(model, 0.5), model[0].weight.data_ptr()
    with pytest.raises(RuntimeError, match="mine"), average.applied():
        assert model[0].weight.data_ptr() != own
        raise RuntimeError("mine")
    assert model[0].weight.data_ptr() == own


def test_a_saved_average_goes_on_as_the_unbroken_one() -> None:
    model = small()
    one = WeightAverage(model, 0.9)
    model[0].weight.data += 1
    one.update()
    two = WeightAverage(small(), 0.9)
    two.load_state_dict(one.state_dict())
    assert two.updates == 1
    for a, b in zip(one.tensors(), two.tensors(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(KeyError, match="another model"):
        WeightAverage(nn.Linear(2, 2), 0.9).load_state_dict(one.state_dict())


def weights(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def test_validation_sees_the_average_and_the_best_holds_it(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(epochs=1), tmp_path / "plain")
    run(toy, config(epochs=1, ema_decay=0.99), tmp_path / "averaged")
    # The steps are the same; what is judged is not.
    assert losses(tmp_path / "averaged") == losses(tmp_path / "plain")
    last = [load_model_state(tmp_path / name / "last") for name in ("plain", "averaged")]
    assert torch.equal(weights(last[0]), weights(last[1]))
    best = load_model_state(tmp_path / "averaged")
    assert not torch.equal(weights(best), weights(last[1]))
    found = newest(tmp_path / "averaged")
    assert found is not None
    saved = found.load("state")["average"]["average"]
    assert torch.equal(weights({k: saved[k] for k in best}), weights(best))

    model = toy.build_model()
    model.load_state_dict(best)
    model.eval()
    batch = {n: torch.from_numpy(np.load(toy.data / f"{n}.npy")) for n in ("x", "y", "row")}
    rows = {name: tensor[toy.val_rows] for name, tensor in batch.items()}
    with torch.no_grad():
        expected = float(toy.loss(model, rows).mean())
    assert losses(tmp_path / "averaged", "epoch")[0] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_equals_the_unbroken_one(toy: ToyTask, tmp_path: Path) -> None:
    cfg = config(epochs=4, ema_decay=0.9)
    run(toy, cfg, tmp_path / "whole")
    for epochs in (1, 3, 4):
        run(toy, replace(cfg, epochs=epochs), tmp_path / "broken")
    assert losses(tmp_path / "broken", "epoch") == losses(tmp_path / "whole", "epoch")
    ends = [load_model_state(tmp_path / name) for name in ("whole", "broken")]
    assert torch.equal(weights(ends[0]), weights(ends[1]))


def test_a_run_goes_on_with_the_decay_it_began_with(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(epochs=1), tmp_path)
    with pytest.raises(ConfigError, match=r"ema_decay None -> 0\.9"):
        run(toy, config(epochs=2, ema_decay=0.9), tmp_path)


def test_a_skipped_step_does_not_count(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(epochs=3, amp="fp16", init_scale=2.0**30, ema_decay=0.9), tmp_path)
    steps = [record for record in records(tmp_path) if record["kind"] == "step"]
    skipped = sum(record["skipped"] for record in steps)
    assert 0 < skipped < len(steps)
    found = newest(tmp_path)
    assert found is not None
    assert found.load("state")["average"]["updates"] == len(steps) - skipped


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="ema_decay"):
        TrainConfig(ema_decay=decay)
