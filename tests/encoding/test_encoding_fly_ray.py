"""Training straight from images on Ray: the losses are those of one process without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fly_kit import TOLERANCE, config, losses, planted

from raypipe.cluster.runner import RayRunner
from raypipe.encoding.frozen import release
from raypipe.encoding.run import fit
from raypipe.runner import LocalRunner

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session", "no_page")]


def test_on_ray_actors_decode_and_the_losses_are_the_same(tmp_path: Path) -> None:
    world, run_dir = planted(tmp_path), tmp_path / "ray"
    fit(config(world, run_dir), RayRunner(joined=False, on_event=print))
    fit(config(world, tmp_path / "local"), LocalRunner())
    np.testing.assert_allclose(losses(run_dir), losses(tmp_path / "local"), rtol=TOLERANCE)
    assert list((run_dir / "memory").glob("decoder-*.csv"))
    release()
