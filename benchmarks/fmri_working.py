"""Parts of benchmarks/fmri.py that compute: cleaning, permutation tests, several subjects, cost by T."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from common import median, say
from fmri_bench import Bench, Metrics, heat, same, to_double
from fmri_data import ROIS_EACH, write_table
from fmri_turn import HERE, MIB, Seen

from raypipe.report.saved import read_json

ONE_BLAS_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def clean(bench: Bench) -> Metrics:
    """The whole brain: detrend, butterworth 0.01 to 0.1 Hz, 24 confounds, z-score.

    Nothing is scaled up. nilearn's BLAS has all cores, ours one, as in a worker.
    """
    spec = {"voxels": bench.voxels, "volumes": bench.size.volumes}
    mine = {**spec, "env": ONE_BLAS_THREAD}
    one, ours = bench.take("our_clean", "clean, 1 thread", threads=1, **mine)
    two, both = bench.take("our_clean", "clean, 2 threads", threads=2, **mine)
    theirs, values = bench.take("nilearn_clean", "clean nilearn", **spec)
    again, _ = bench.take("our_clean", "clean, 1 thread", threads=1, **mine)
    for found in (ours, both):
        same(found, values, 1e-5)
    seconds = median([one.seconds, again.seconds])
    return {
        "clean_voxels": bench.voxels,
        "clean_s": seconds,
        "clean_2_threads_s": two.seconds,
        "clean_nilearn_s": theirs.seconds,
        "clean_butterworth_ratio": theirs.seconds / seconds,
        "clean_butterworth_2_threads_ratio": theirs.seconds / two.seconds,
        "clean_anon_mib": one.anon_mib,
        "clean_nilearn_anon_mib": theirs.anon_mib,
    }


def permutations(bench: Bench) -> Metrics:
    """Permutation tests of 1k voxels in 12 runs, left out one by one; refitting is timed on fewer."""
    made: Metrics = {}
    for estimator, key in (("svc", "svc"), ("ridge", "ridge")):
        for n in bench.samples:
            suffix = "" if n == bench.samples[0] else f"_{n}"
            few = max(3, bench.permutations * 5 * bench.samples[0] ** 2 // (100 * n**2))
            spec = {"estimator": estimator, "samples": n, "voxels": bench.size.rois["1k"]}
            many = bench.permutations * bench.samples[0] ** 3 // n**3
            name = f"{key} {n} samples"
            ours, null = _decoding(bench, "our_permutations", name, spec, max(few, many))
            theirs, refit = _decoding(bench, "refit_permutations", f"{name} refitted", spec, few)
            same(null[:few], refit, 1e-6)
            made[f"perm_{key}_ms{suffix}"] = 1e3 * ours.seconds
            made[f"perm_{key}_refit_ms{suffix}"] = 1e3 * theirs.seconds
            made[f"perm_{key}_ratio{suffix}"] = theirs.seconds / ours.seconds
            if estimator == "svc":
                gram, by_gram = _decoding(
                    bench, "gram_permutations", f"{name} sklearn's", spec, few
                )
                same(by_gram, refit, 1e-6)
                made[f"perm_svc_precomputed_ratio{suffix}"] = theirs.seconds / gram.seconds
    return made | {"perm_samples": list(bench.samples), "perm_voxels": bench.size.rois["1k"]}


def _decoding(
    bench: Bench, contender: str, name: str, spec: Metrics, n: int
) -> tuple[Seen, np.ndarray]:
    """One BLAS thread each, as a worker has."""
    spec = {**spec, "env": ONE_BLAS_THREAD, "permutations": n}
    return bench.take(contender, f"{n} permutations, {name}", **spec)


def subjects(bench: Bench) -> Metrics:
    """`raypipe fmri roi` of three regions: one subject and four, then four on Ray by 1 and 2 workers."""
    names = [f"subject_{n}.nii.gz" for n in range(4)]
    for name in names:  # names of one file: each is unpacked and cached on its own
        (bench.inputs / name).unlink(missing_ok=True)
        (bench.inputs / name).hardlink_to(bench.inputs / "i16.nii.gz")
    runs = {
        "local_1": _run_subjects(bench, names[:1], "local", 1),
        "local_4": _run_subjects(bench, names, "local", 1),
        "ray_4_workers_1": _run_subjects(bench, names, "ray", 1),
        "ray_4_workers_2": _run_subjects(bench, names, "ray", 2),
    }
    made: Metrics = {}
    for name, (seconds, peak_mib) in runs.items():
        say(f"  subjects {name}: {seconds:.2f} s, a worker's peak {peak_mib:.0f} MiB")
        made[f"subjects_{name}_s"], made[f"subjects_{name}_total_mib"] = seconds, peak_mib
    local = made["subjects_local_4_total_mib"] / made["subjects_local_1_total_mib"]
    speed = made["subjects_ray_4_workers_1_s"] / made["subjects_ray_4_workers_2_s"]
    return made | {"subjects_memory_4_to_1": local, "subjects_speedup_2_workers": speed}


def _run_subjects(bench: Bench, names: list[str], runner: str, workers: int) -> tuple[float, float]:
    """(seconds of computing, largest RssAnon of a worker in MiB) by the run's own records."""
    table = bench.inputs / "subjects.csv"
    write_table(table, bench.inputs, names)
    run_dir, cache = bench.fresh("run"), bench.fresh("cache")
    command = [
        sys.executable,
        "-m",
        "raypipe",
        "fmri",
        "roi",
        "--table",
        table,
        "--run-dir",
        run_dir,
    ]
    command += ["--cache-dir", cache, "--runner", runner, "--workers", workers, "--detrend"]
    command += ["--roi", *(f"{size}={bench.roi(size)}" for size in bench.size.rois)]
    os.sync()
    path = f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    records = [read_json(file, "run again") for file in (run_dir / "units").glob("*.json")]
    seconds = float(read_json(run_dir / "run.json", "run again")["summary"]["seconds"])
    return seconds, max(record["peak_anon_bytes"] for record in records) / MIB


def scaling(bench: Bench) -> Metrics:
    """T to 2T: the first region with the cache entry finished, another region, cleaning."""
    n = bench.size.volumes
    passes: dict[int, list[float]] = {n: [], 2 * n: []}
    reads: dict[int, float] = {}
    cleaned: dict[int, list[float]] = {n: [], 2 * n: []}
    for turn in range(bench.rounds):
        for volumes, name in ((n, "i16"), (2 * n, "i16x2")):
            heat(bench.inputs / f"{name}.nii.gz")
            spec = {**bench.scan(name), "cache_dir": bench.fresh("cache")}
            said = f"first of {volumes} volumes"
            one, _ = bench.take("our_first", said, cache=True, roi=bench.roi("5k"), **spec)
            passes[volumes].append(one.whole_s)
            if turn == 0:
                rois = [bench.roi("5k", number) for number in range(ROIS_EACH)]
                said = f"second of {volumes} volumes"
                reads[volumes] = bench.take("our_second", said, rois=rois, rounds=5, **spec)[
                    0
                ].seconds
            how = {"voxels": bench.voxels // 4, "volumes": volumes, "threads": 1}
            how |= {"env": ONE_BLAS_THREAD}
            found, _ = bench.take("our_clean", f"clean {volumes} volumes", **how)
            cleaned[volumes].append(found.seconds)
    return {
        "t_scaling": to_double(passes, n),
        "t_scaling_second_roi": reads[2 * n] / reads[n],
        "t_scaling_clean": to_double(cleaned, n),
    }
