"""On CUDA: a network is fitted, scored and applied; pictures are computed without TF32 of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from predict_kit import STATED, arguments, fitted_run, write_pages
from segment_runs import config

from raypipe.cli import main
from raypipe.runner import LocalRunner
from raypipe.segment import apply
from raypipe.segment.assess import evaluate
from raypipe.segment.config import SegmentEvaluateConfig
from raypipe.segment.run import fit
from raypipe.segment.saved import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"),
]


def test_it_is_fitted_and_scored_on_a_gpu(nuclei: Path, tmp_path: Path) -> None:
    fit(config(nuclei, tmp_path / "run", device="cuda"), LocalRunner())
    there = evaluate(SegmentEvaluateConfig(run_dir=tmp_path / "run", device="cuda"))
    here = evaluate(SegmentEvaluateConfig(run_dir=tmp_path / "run", device="cpu"))
    assert there["pixels"] == pytest.approx(here["pixels"], abs=1e-3)


@pytest.mark.parametrize("most", [apply.MOST_WHOLE_PIXELS, 100])
def test_pictures_are_as_on_the_cpu(
    fitted: Path, nuclei: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Whole, or by tiles; TF32, which cuDNN takes by itself, would differ by some 1e-3."""
    monkeypatch.setattr(apply, "MOST_WHOLE_PIXELS", most)
    monkeypatch.setattr(apply, "TILE", 16)
    image = tifffile.imread(nuclei / "test/images/nuclei_000.tif")[None]
    module, saved = load_model(fitted)
    here = apply.logits_of(module, saved, image)
    there = apply.logits_of(module.cuda(), saved, image)
    atol = 1e-5 * float(np.ptp(here.numpy()))
    torch.testing.assert_close(there, here, rtol=0, atol=atol)


def test_predict_gives_what_the_whole_picture_gives(tmp_path: Path) -> None:
    run_dir = fitted_run(tmp_path / "run")
    pages = write_pages(tmp_path / "in.tif")
    args = arguments(run_dir, tmp_path / "in.tif", tmp_path / "out.tif", "--what", "logits")
    assert main([*args, *STATED, "--device", "cuda"]) == 0
    module, saved = load_model(run_dir)
    for page, got in zip(pages, tifffile.imread(tmp_path / "out.tif"), strict=True):
        wanted = apply.logits_of(module.cuda(), saved, page[None])[0, 0].numpy()
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.ptp(wanted))
