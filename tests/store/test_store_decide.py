"""What becomes of what is there already: refused, found finished, resumed, replaced, discarded."""

from __future__ import annotations

import pytest
from store_kit import (
    abandon,
    beside,
    fill,
    make_spec,
    rows_of,
    sources_of,
    whole,
)

from raypipe.errors import FingerprintMismatch, StoreCorrupt, StoreError
from raypipe.store import (
    FeatureStore,
    ShardWriter,
    discard_store,
    open_for_writing,
    verify,
)
from raypipe.store.recover import Found, decide


def test_refusals_leave_everything_as_it_was(tmp_path):
    spec = make_spec(tmp_path)
    whole(spec)
    before = {p: p.read_bytes() for p in spec.path.parent.iterdir()}
    other = make_spec(
        tmp_path, identity={"backbone": "dinov2_k", "layer": -1, "weights": "00ff"}, grid=2
    )
    with pytest.raises(FingerprintMismatch) as caught:
        open_for_writing(other, run_id="r")
    text = str(caught.value)
    assert "grid (--batch-size) is 4, asked 2" in text
    assert 'identity.backbone is "dinov2_q", asked "dinov2_k"' in text
    assert "--overwrite" in text
    assert "\n" not in text
    assert {p: p.read_bytes() for p in spec.path.parent.iterdir()} == before
    with open_for_writing(other, run_id="r", overwrite=True) as run:
        assert len(run.missing()) == 5
        assert not spec.path.exists()
        fill(run)
        run.seal()
    assert FeatureStore.open(spec.path).fingerprint == other.fingerprint


def test_sealed_store_has_nothing_to_do(tmp_path):
    spec = make_spec(tmp_path)
    whole(spec)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in spec.path.parent.iterdir()}
    for overwrite in (False, True):
        with open_for_writing(spec, run_id="r", overwrite=overwrite) as run:
            assert run.sealed
            assert run.missing() == []
            assert run.progress.rows_done == run.progress.rows_kept == 10
            assert run.seal() == spec.path
            with pytest.raises(StoreError, match="nothing to write"):
                _ = run.target
    assert {
        p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in spec.path.parent.iterdir()
    } == before


def test_foreign_files_are_not_touched(tmp_path):
    spec = make_spec(tmp_path)
    spec.path.parent.mkdir(parents=True)
    spec.path.write_bytes(b"somebody's own")
    with pytest.raises(StoreError, match="without its manifest"):
        open_for_writing(spec, run_id="r")
    assert beside(spec) == ["train.npy"]
    assert spec.path.read_bytes() == b"somebody's own"
    whole(spec, overwrite=True)
    assert verify(spec.path).ok


def test_overwrite_resumes_a_store_that_fits(tmp_path):
    spec = make_spec(tmp_path)
    run = open_for_writing(spec, run_id="r", overwrite=True)
    with ShardWriter(run.target, "w") as out:
        out.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
        out.commit()
    abandon(run)
    with open_for_writing(spec, run_id="r", overwrite=True) as run:
        assert run.missing() == [(4, 8), (8, 10)]


def test_discard(tmp_path):
    spec = make_spec(tmp_path)
    whole(spec)
    discard_store(spec.path)
    assert beside(spec) == []
    run = open_for_writing(spec, run_id="r")
    fill(run)
    abandon(run)
    discard_store(spec.path)
    assert beside(spec) == []
    discard_store(tmp_path / "nowhere" / "train.npy")


def test_decide_is_a_table(tmp_path):
    spec = make_spec(tmp_path)
    nothing = Found(manifest=None, partial_bytes=None, final_bytes=None)
    assert decide(nothing, spec, overwrite=False) == "new"
    whole(spec)
    sealed = Found.at(spec.paths).manifest
    table = [
        (sealed, None, spec.nbytes, "sealed"),
        (sealed.with_state("writing"), 5, None, "resume"),
        (sealed.with_state("writing"), None, None, "resume"),
        (sealed.with_state("writing"), None, 5, "unseal"),
        (sealed.with_state("discarded"), None, 5, "replace"),
        (sealed.with_state("writing"), 5, 5, StoreError),
        (sealed, None, 5, StoreCorrupt),
        (sealed, 5, None, StoreCorrupt),
        (None, 5, None, StoreError),
        (None, None, 5, StoreError),
    ]
    for manifest, partial, final, wanted in table:
        found = Found(manifest=manifest, partial_bytes=partial, final_bytes=final)
        if isinstance(wanted, str):
            assert decide(found, spec, overwrite=False) == wanted
        else:
            with pytest.raises(wanted):
                decide(found, spec, overwrite=False)
            assert decide(found, spec, overwrite=True) == "replace"
