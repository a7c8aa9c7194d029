"""fMRI: regions out of a 91x109x91x320 scan, cleaning, permutation tests; against nilearn and scikit-learn.

Made-up scans (fmri_data.py) of float32 and of scaled int16, .nii.gz, in a scratch folder; pages in the
cache. Every contender runs in a fresh process; its clock starts after imports, its memory is RssAnon above
what imports take (*_total_mib: with imports and Python), to its end. Answers are compared.
first_roi_f32_ratio, first_roi_i16_ratio: NiftiMasker over the loader that makes its cache behind the first
answer (*_no_cache_ratio: storing nothing; *_process_s: with imports; *_whole_s: until the entry is whole);
first_roi_anon_mib: ours, the largest of all four. second_roi_ms_1k, _5k, _10k: the loader, on
regions not read before, from the cache; beside it the store's reader, a plain .nii mapped by nibabel, and
NiftiMasker with memory= (a new region; *_again: the same once more). clean_butterworth_ratio: the whole
brain at once, nilearn's time over ours on one thread. labels_100_*: by the command, records and report
included. subjects_*: four names of one file. perm_svc_ratio, perm_ridge_ratio: a permutation by refitting
scaler and model over ours, 216 samples, 12 runs, 1000 permutations (*_864: as many samples, but only 15
permutations, over which what is made once is spread; *_precomputed: scikit-learn's SVC on one Gram matrix
a fold). t_scaling: seconds of 2T over those of T until the entry is whole; at most 2.3.
--only first,second,... runs parts; --quick takes a small scan, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import emit, parser, say
from fmri_bench import Bench, Metrics
from fmri_data import FULL, QUICK, brain, make_inputs
from fmri_reading import first, labels, loader, second
from fmri_working import clean, permutations, scaling, subjects

PARTS: dict[str, Callable[[Bench], Metrics]] = {
    "first": first,
    "second": second,
    "clean": clean,
    "labels": labels,
    "subjects": subjects,
    "permutations": permutations,
    "scaling": scaling,
    "loader": loader,
}


def main() -> None:
    """Make the scans, run the parts, print one line."""
    args = parser(__doc__)
    args.add_argument("--only", type=_names, default=list(PARTS), help=", ".join(PARTS))
    args.add_argument("--rounds", type=int, default=2, help="of first and scaling")
    args.add_argument("--quick", action="store_true", help="a small scan: is the script whole?")
    args.add_argument("--scratch", type=Path, help="where the folder for scans is made (5 GB)")
    args.add_argument(
        "--inputs", type=Path, help="keep scans here, or take those of an earlier run"
    )
    options = args.parse_args()
    size = QUICK if options.quick else FULL
    metrics: Metrics = {"parts": options.only, "rounds": options.rounds, "quick": options.quick}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        bench = Bench(
            root=Path(folder),
            size=size,
            rounds=options.rounds,
            voxels=int(brain(size.shape).sum()),
            permutations=100 if options.quick else 1000,
            samples=(96,) if options.quick else (216, 864),
        )
        _inputs(bench, options.inputs)
        for name in options.only:
            say(name)
            began = time.monotonic()
            metrics |= PARTS[name](bench)
            say(f"  {name} took {time.monotonic() - began:.0f} s")
    emit("fmri", {key: _short(value) for key, value in metrics.items()}, options.json)


def _inputs(bench: Bench, kept: Path | None) -> None:
    """Scans and masks in ``bench.inputs``, made unless ``kept`` has them."""
    target = kept or bench.inputs
    if not (target / "atlas.nii.gz").exists():  # written last
        say("making scans")
        target.mkdir(parents=True, exist_ok=True)
        make_inputs(target.absolute(), bench.size)
    if kept is not None:
        bench.inputs.symlink_to(kept.absolute())


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no part; choose of {', '.join(PARTS)}")
    return names


def _short(value: object) -> object:
    """Four figures are more than a shared machine repeats."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
