"""cluster.yaml passes Ray's own preparation and schema, and keeps its promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared() -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config["file_mounts"] = {remote: str(ROOT) for remote in config["file_mounts"]}
    config = prepare_config(config)
    validate_config(config)
    return config


def test_head_is_cpu_only_and_workers_scale_from_zero(prepared: dict) -> None:
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["resources"].get("GPU", 0) == 0
    worker = types["gpu_worker"]
    assert worker["min_workers"] == 0 < worker["max_workers"]
    assert worker["resources"]["GPU"] >= 1


def test_the_dashboard_stays_on_loopback_and_versions_are_those_tested(prepared: dict) -> None:
    start = " ".join(prepared["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    for commands in ("head_setup_commands", "worker_setup_commands"):
        assert "-c /home/ray/raypipe/constraints.txt" in " ".join(prepared[commands])
    pinned = next(
        line.strip().partition("==")[2]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("ray==")
    )
    for image in (value for key, value in prepared["docker"].items() if key.endswith("image")):
        assert f":{pinned}-" in image
        assert "nightly" not in image
