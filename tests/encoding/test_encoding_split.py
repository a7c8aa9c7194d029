"""Which rows train: each valid one once; listed or computed by a rule that a resumed run finds again."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoding_kit import PLANTED, TRAIN, World, fit_config
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.encoding import EvaluateConfig, split
from raypipe.encoding.assess import evaluate
from raypipe.encoding.prepare import prepare
from raypipe.encoding.run import fit
from raypipe.encoding.split import load_split, same_images, save_split, seeded_split
from raypipe.errors import ConfigError, InputError, MissingInput, StoreCorrupt
from raypipe.runner import LocalRunner
from raypipe.stream import SplitRows

NAMES = tuple(f"{i}.png" for i in range(30))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=3, max_size=200), st.floats(0.01, 0.9), st.integers(0, 9))
def test_a_split_has_each_valid_row_once(flags: list[bool], fraction: float, seed: int) -> None:
    valid = np.array([*flags, True, True, True, True])
    if fraction * valid.sum() > valid.sum() - 1.5:
        return
    made = seeded_split(valid, fraction, seed)
    both = np.concatenate([made.train, made.val])
    np.testing.assert_array_equal(np.sort(both), np.flatnonzero(valid))
    assert len(made.val) == max(2, round(fraction * valid.sum())) and len(made.train)
    again = seeded_split(valid, fraction, seed)
    np.testing.assert_array_equal(made.val, again.val)


def test_seeds_differ_and_the_held_out_are_spread() -> None:
    valid = np.ones(1000, bool)
    one, two = seeded_split(valid, 0.1, 0), seeded_split(valid, 0.1, 1)
    assert len(np.intersect1d(one.val, two.val)) < 40
    assert 380 < np.mean(one.val) < 620


def test_too_few_images_are_refused() -> None:
    with pytest.raises(InputError, match="2 valid images"):
        seeded_split(np.array([True, True, False]), 0.1, 0)


def test_rows_are_computed_above_the_border_where_all_are_valid() -> None:
    valid = np.ones(split.LISTED_ROWS + 1, bool)
    at, above = (seeded_split(valid[:n], 0.1, 0) for n in (len(valid) - 1, len(valid)))
    valid[77] = False
    holed = seeded_split(valid, 0.1, 0)
    assert [isinstance(s.train, SplitRows) for s in (at, above, holed)] == [False, True, False]
    assert [isinstance(s.val, SplitRows) for s in (at, above, holed)] == [False, True, False]
    assert len(above.val) == round(0.1 * len(valid))
    counts = np.bincount(np.concatenate([above.train, above.val]), minlength=len(valid))
    assert (counts == 1).all()


def test_a_split_of_a_hundred_million_rows_takes_no_memory() -> None:
    valid = np.broadcast_to(np.True_, 10**8)
    tracemalloc.start()
    made = seeded_split(valid, 0.1, 0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made.train) == 9 * 10**7
    assert peak_bytes < 1 << 20 and len(pickle.dumps(made)) < 1000


def test_a_saved_split_comes_back_and_is_not_changed(tmp_path: Path) -> None:
    made = seeded_split(np.arange(30) % 7 > 0, 0.2, 4)
    path = tmp_path / "split.json"
    save_split(made, NAMES, path)
    save_split(made, NAMES, path)
    loaded = load_split(path)
    np.testing.assert_array_equal(loaded.train, made.train)
    np.testing.assert_array_equal(loaded.val, made.val)
    assert json.loads(path.read_text())["val_names"] == [NAMES[row] for row in made.val]
    with pytest.raises(ConfigError, match="another way"):
        save_split(seeded_split(np.arange(30) % 7 > 0, 0.2, 5), NAMES, path)
    with pytest.raises(MissingInput):
        load_split(tmp_path / "none.json")


@pytest.fixture
def few_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows are many."""
    monkeypatch.setattr(split, "LISTED_ROWS", 10)


@pytest.mark.usefixtures("few_listed")
def test_a_computed_split_is_saved_as_a_few_numbers(tmp_path: Path) -> None:
    made, path = seeded_split(np.ones(30, bool), 0.2, 4), tmp_path / "split.json"
    save_split(made, NAMES, path)
    save_split(made, NAMES, path)
    assert (load_split(path).train, load_split(path).val) == (made.train, made.val)
    assert path.stat().st_size < 500
    assert same_images(path, NAMES) and not same_images(path, NAMES[::-1])
    for other in (seeded_split(np.ones(30, bool), 0.2, 5), seeded_split(np.ones(30, bool), 0.3, 4)):
        with pytest.raises(ConfigError, match="another way"):
            save_split(other, NAMES, path)
    path.write_text(path.read_text().replace('"val_digest": "', '"val_digest": "0'))
    with pytest.raises(StoreCorrupt, match="drawn in another way"):
        load_split(path)


@pytest.mark.usefixtures("no_page")
def test_a_fit_of_computed_rows_goes_on_and_is_that_of_their_list(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(run_dir: Path) -> list[float]:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("loss") or json.loads(line)["val_loss"] for line in lines]

    whole, parts, listed = (tmp_path / name for name in ("whole", "parts", "listed"))
    monkeypatch.setattr(split, "LISTED_ROWS", 10)
    fit(fit_config(world, whole), LocalRunner())
    fit(fit_config(world, parts, train=replace(TRAIN, epochs=1)), LocalRunner())
    fit(fit_config(world, parts), LocalRunner())
    assert losses(parts) == losses(whole)
    task = prepare(fit_config(world, whole), "01", whole).task
    assert isinstance(task.train_rows, SplitRows) and isinstance(task.val_rows, SplitRows)

    # The same rows as arrays: other numbers in the record, the same training.
    computed = (np.asarray(task.train_rows), np.asarray(task.val_rows))
    monkeypatch.setattr(split, "LISTED_ROWS", PLANTED.n_train)
    monkeypatch.setattr(split, "_listed", lambda *_: computed)
    fit(fit_config(world, listed), LocalRunner())
    assert losses(listed) == losses(whole)

    # And it is applied to its validation rows: read from the numbers.
    one, other = (
        evaluate(EvaluateConfig(run_dir=run_dir, split="val", device="cpu"))
        for run_dir in (whole, listed)
    )
    assert one["01"]["n_images"] == len(task.val_rows)
    assert one["01"]["mean_r"] == other["01"]["mean_r"]


@pytest.mark.usefixtures("no_page")
def test_a_run_begun_with_a_list_of_more_rows_is_refused_in_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(fit_config(world, tmp_path, train=replace(TRAIN, epochs=1)), LocalRunner())
    monkeypatch.setattr(split, "LISTED_ROWS", 10)
    with pytest.raises(ConfigError, match=r"earlier raypipe's list .*--no-resume") as refused:
        fit(fit_config(world, tmp_path), LocalRunner())
    assert "\n" not in str(refused.value)
    # What is there is applied all the same.
    evaluate(EvaluateConfig(run_dir=tmp_path, split="val", device="cpu"))
    done = fit(fit_config(world, tmp_path, resume=False), LocalRunner()).subjects[0].result
    assert done.epochs == TRAIN.epochs
