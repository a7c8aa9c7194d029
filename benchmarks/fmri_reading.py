"""Parts of benchmarks/fmri.py that read: the first region, others, labels, the loader's memory.

Each takes a ``Bench`` and gives its metrics. Within a round contenders take turns; a ratio is the median of
the rounds' ratios.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

from common import median
from fmri_bench import Bench, Metrics, cached, heat, ratio, same
from fmri_data import ROIS_EACH
from fmri_turn import MIB, Seen


def first(bench: Bench) -> Metrics:
    """The first region of a .nii.gz, 5k voxels: with the cache being made, without one, nilearn."""
    made: Metrics = {}
    for name in ("f32", "i16"):
        seen: dict[str, list[Seen]] = {"ours": [], "ours_no_cache": [], "nilearn": []}
        spec = {**bench.scan(name), "roi": bench.roi("5k")}
        for _ in range(bench.rounds):
            heat(bench.inputs / f"{name}.nii.gz")
            cache = bench.fresh("cache")
            one, ours = bench.take(
                "our_first", f"first {name}", cache=True, cache_dir=cache, **spec
            )
            two, once = bench.take(
                "our_first", f"first {name} --no-cache", cache=False, cache_dir=cache, **spec
            )
            three, theirs = bench.take("nilearn_first", f"first {name} nilearn", **spec)
            same(ours, theirs, 1e-6)
            same(once, theirs, 1e-6)
            for key, what in zip(seen, (one, two, three), strict=True):
                seen[key].append(what)
        made |= _first_keys(name, seen)
    made["first_roi_anon_mib"] = max(
        made[f"first_roi_{name}_anon_mib_{who}"]
        for name in ("f32", "i16")
        for who in ("ours", "ours_no_cache")
    )
    return made


def _first_keys(name: str, seen: dict[str, list[Seen]]) -> Metrics:
    made: Metrics = {}
    for who, turns in seen.items():
        key = f"first_roi_{name}"
        made[f"{key}_s_{who}"] = median([one.seconds for one in turns])
        made[f"{key}_process_s_{who}"] = median([one.process_s for one in turns])
        made[f"{key}_anon_mib_{who}"] = max(one.anon_mib for one in turns)
        made[f"{key}_total_mib_{who}"] = max(one.total_mib for one in turns)
    made[f"first_roi_{name}_whole_s_ours"] = median([one.whole_s for one in seen["ours"]])
    for who, key in (("ours", "ratio"), ("ours_no_cache", "no_cache_ratio")):
        made[f"first_roi_{name}_{key}"] = ratio(seen["nilearn"], seen[who])
    return made


def second(bench: Bench) -> Metrics:
    """Other regions of a scan that was read before, pages in memory, f32."""
    made: Metrics = {}
    cache = cached(bench, "f32")
    plain = _plain(bench)
    for size in bench.size.rois:
        rois = [bench.roi(size, number) for number in range(ROIS_EACH)]
        spec = {**bench.scan("f32"), "cache_dir": cache, "rois": rois, "rounds": 5}
        ours, values = bench.take("our_second", f"second {size}", **spec)
        store, raw = bench.take("store_second", f"second {size} by the store", **spec)
        mapped, indexed = bench.take("mapped_second", f"second {size} nibabel", plain=plain, **spec)
        memory = bench.fresh("joblib")
        theirs, also = bench.take("nilearn_second", f"second {size} nilearn", memory=memory, **spec)
        for other in (raw, indexed, also):
            same(values, other, 1e-6)
        made |= {
            f"second_roi_ms_{size}": 1e3 * ours.seconds,
            f"second_roi_worst_ms_{size}": 1e3 * ours.marks["answered"]["worst"],
            f"second_roi_store_ms_{size}": 1e3 * store.seconds,
            f"second_roi_nibabel_mmap_ms_{size}": 1e3 * mapped.seconds,
            f"second_roi_nilearn_memory_ms_{size}": 1e3 * theirs.seconds,
            f"second_roi_nilearn_again_ms_{size}": 1e3 * theirs.marks["answered"]["again"],
            f"second_roi_nibabel_mmap_ratio_{size}": mapped.seconds / ours.seconds,
            f"second_roi_nilearn_memory_ratio_{size}": theirs.seconds / ours.seconds,
            f"second_roi_anon_mib_{size}": ours.anon_mib,
        }
    plain.unlink()
    return made


def _plain(bench: Bench) -> Path:
    """f32.nii, unpacked."""
    path = bench.root / "f32.nii"
    with gzip.open(bench.inputs / "f32.nii.gz") as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 4 << 20)
    return path


def labels(bench: Bench) -> Metrics:
    """Means of 100 labels: from the .nii.gz, and from the cache; against NiftiLabelsMasker."""
    spec = {**bench.scan("f32"), "atlas": bench.inputs / "atlas.nii.gz"}
    heat(bench.inputs / "f32.nii.gz")
    cache = bench.fresh("cache")
    runs = [bench.fresh(f"labels_{n}") for n in range(2)]
    turns = []
    for run, name in zip(runs, ("labels", "labels cached"), strict=True):
        turns.append(bench.take("our_labels", name, run_dir=run, cache_dir=cache, **spec))
    theirs, values = bench.take("nilearn_labels", "labels nilearn", **spec)
    for _, ours in turns:
        same(ours, values, 1e-6)
    (cold, _), (warm, _) = turns
    return {
        "labels_100_s": cold.seconds,
        "labels_100_cached_s": warm.seconds,
        "labels_100_nilearn_s": theirs.seconds,
        "labels_100_ratio": theirs.seconds / cold.seconds,
        "labels_100_cached_ratio": theirs.seconds / warm.seconds,
        "labels_100_anon_mib": cold.anon_mib,
        "labels_100_nilearn_anon_mib": theirs.anon_mib,
    }


def loader(bench: Bench) -> Metrics:
    """``MemoryEfficientLoader``: a whole scaled scan as an image over a map, and regions one by one."""
    seen, _ = bench.take("our_whole", "whole scan", **bench.scan("i16"))
    rois = [bench.roi("10k", number) for number in range(ROIS_EACH)]
    spec = {**bench.scan("i16"), "cache_dir": cached(bench, "i16"), "rois": rois, "rounds": 2}
    read, _ = bench.take("our_second", "regions", **spec)
    return {
        "loader_whole_scan_s": seen.seconds,
        "loader_whole_scan_anon_mib": seen.anon_mib,
        "loader_regions_anon_mib": read.anon_mib,
        "loader_imports_mib": seen.base_bytes / MIB,
    }
