"""Batches of random rows: our loaders, the memory copy that bounds them, and six others.

Every contender reads the same rows in the same run, each turn in a process of its own, rounds
taking turns; figures are medians of the rounds, ratios are formed within one round. Pages are in
the cache but for the cold pass. Batch 16 of 962x768 float16, 16 of 257x768 float32 (keys end in
_257x768), 256 of 768 float32 (_768).
limit_gbps: the copy of as many bytes into a reused buffer, by the best of 1 to as many threads as
ours gathers with (limit_threads), in the same process and in turn with ours. plain: without Ray.
ray: row numbers through Ray Data. anon_mib_NAME: largest RssAnon of the consumer, above what its
imports take; cpu_s_per_gb_NAME: of its process tree; start_s_NAME: from its imports to its first batch.
cold_NAME_gbps: one epoch, or 10 s of it, of the largest rows, each contender's files dropped from the
page cache before (posix_fadvise; cold_pages_left: the part that stayed). plain_cold_gbps and
plain_window_cold_gbps (all three kinds of rows): our loader so, in the global order and with a
shuffle window of about 64 MiB (window_rows; 16 pieces of neighbours of 4 MiB each), on
cold_window_gb of rows, in two rounds (one of files above 1 GB; cold_window_rounds_done);
plain_window_to_plain_cold: the ratio within a round. Each such turn is one epoch, or 5 s of it, timed from
before its first batch; plain_cold_part, plain_window_cold_part: what was read of the epoch. The file fits
the memory, so the kernel reads ahead around every row, and later ones are found in the cache: where a part
is below 1 the global order's figure is of its slow beginning, and the ratio too large. What the window
costs is window_displacement and window_neighbour_correlation (`raypipe.stream.shuffle_quality`: a global
shuffle has 1 and 0).
--minutes bounds the whole: rounds are left out when they would not end in time (rounds_done), but
the first of each kind.
A peer that needs an environment of its own (mosaicml-streaming pins numpy < 2.2) is run by the
interpreter that BENCH_PYTHON_NAME names, e.g. BENCH_PYTHON_MOSAICML.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import emit, median, parser, say
from stream_cold import cold_pass, cold_windows
from stream_data import LARGE, TOKENS, VECTORS, Rows, heat, make, make_sparse
from stream_peers import PEERS
from stream_turn import Seen, TurnFailed, interpreter, take_turn

OURS = ("plain", "ray")
# The part of --minutes after which a table begins no round any more; what follows it is short.
ROUNDS_END = {"large": 0.5, "257x768": 0.75, "768": 0.92}
BIG_ROWS = 10_000_000
MIB = 2**20
Metrics = dict[str, Any]


def find_peers(asked: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the peers that import, and the reason of each that does not."""
    versions, missing = {}, {}
    for name in asked:
        peer = PEERS[name]
        code = f"import {peer.module}; from importlib.metadata import version; "
        code += f"print('@@' + version({peer.package!r}))"
        done = subprocess.run([interpreter(name), "-c", code], capture_output=True, text=True)
        if done.returncode == 0:
            versions[name] = f"{peer.package} {done.stdout.rpartition('@@')[2].strip()}"
        else:
            missing[name] = (done.stderr.strip().splitlines() or ["does not import"])[-1]
            say(f"MISSING peer {name}: {missing[name]}")
    return versions, missing


class Table:
    """All contenders on one kind of rows."""

    def __init__(
        self, rows: Rows, n: int, root: Path, options: argparse.Namespace, until: float
    ) -> None:
        self.rows, self.n, self.options, self.until = rows, n, options, until
        self.folder = root / f"rows{rows.suffix}"
        self.folder.mkdir()
        self.npy = make(self.folder / "rows.npy", rows, n)
        self.workers: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.rounds: list[dict[str, Seen]] = []

    def take(self, name: str, npy: Path | None = None, n: int = 0, **how: Any) -> Seen | None:
        """One turn; a failure is said, kept, and ends this contender's part.

        npy, n : another file, and its rows.
        """
        how = {"seconds": self.options.seconds, "warm": self.options.warm, **how}
        if name not in OURS:
            how.setdefault("workers", self.workers.get(name, 0))
        try:
            file, count = (npy, n) if npy else (self.npy, self.n)
            return take_turn(name, self.rows, count, file, self.folder / name, **how)
        except TurnFailed as error:
            self.failed[name] = str(error)
            say(f"FAILED {name} on {self.rows.name}: {error}")
            return None

    def prepare(self, peers: list[str]) -> None:
        """Make each peer's format, and find the number of workers that suits it."""
        for name in peers:
            if PEERS[name].prepare is not None and self.take(name, do="prepare") is None:
                continue
            rates = {}
            for workers in PEERS[name].workers:
                if len(PEERS[name].workers) == 1:
                    rates[workers] = 0.0
                elif seen := self.take(name, workers=workers, seconds=1.0, warm=1.0):
                    rates[workers] = seen.gbps
            if rates:
                self.failed.pop(name, None)
                self.workers[name] = max(rates, key=lambda count: rates[count])
                say(f"  {name}: {_shown(rates)} GB/s by workers")

    def contend(self) -> None:
        """The rounds: every contender once, forwards and backwards by turns."""
        names = [*OURS, *self.workers]
        longest = 0.0
        for turn in range(self.options.rounds):
            began = time.monotonic()
            if turn and began + longest > self.until:
                say(f"  no time for round {turn + 1}")
                break
            found = {}
            for name in names if turn % 2 == 0 else reversed(names):
                if name in self.failed:
                    continue
                heat(self.npy)
                heat(self.folder / name)
                if seen := self.take(name):
                    found[name] = seen
            self.rounds.append(found)
            longest = max(longest, time.monotonic() - began)
            say(f"  round {turn + 1}: " + _shown({k: found[k].gbps for k in names if k in found}))

    def metrics(self, peers: list[str]) -> Metrics:
        """The keys of this table; None of a peer that could not be measured."""
        gbps = {name: self._median(name, lambda s: s.gbps) for name in (*OURS, *self.workers)}
        gbps = {name: rate for name, rate in gbps.items() if rate is not None}
        made: Metrics = {f"peer_{name}_gbps": gbps.get(name) for name in peers}
        made |= {"best_peer": None, "best_peer_gbps": None, "rounds_done": len(self.rounds)}
        for name in OURS:
            made[f"{name}_gbps"] = gbps.get(name)
            made[f"{name}_to_limit"] = self._median(name, lambda s: s.marks["paired"]["to_limit"])
        for key in ("limit_gbps", "limit_cached_gbps", "limit_threads"):
            made[key] = self._median("plain", lambda s, k=key: s.marks["paired"][k])
        made["plain_to_limit_by_threads"] = self._by_threads()
        measured = {name: gbps[name] for name in self.workers if name in gbps}
        best = max(measured, key=lambda name: measured[name], default=None)
        if best is not None:
            made["best_peer"], made["best_peer_gbps"] = best, measured[best]
        for name in OURS:
            made[f"{name}_to_best_peer"] = self._ratio(name, best) if best else None
        for name in gbps:
            made[f"start_s_{name}"] = self._median(name, lambda s: s.marks["first"]["start_s"])
            made[f"anon_mib_{name}"] = self._median(name, _anon_mib)
            made[f"cpu_s_per_gb_{name}"] = self._median(
                name, lambda s: s.cpu_s / (s.marks["measured"]["bytes"] / 1e9)
            )
        made |= {"rows": self.n, "gb": self.n * self.rows.row_bytes / 1e9}
        made |= {"batch": self.rows.batch, "peer_workers": self.workers}
        if self.failed:
            made["failed"] = self.failed
        return {f"{key}{self.rows.suffix}": value for key, value in made.items()}

    def _median(self, name: str, of: Any) -> float | None:
        found = [of(turn[name]) for turn in self.rounds if name in turn]
        return median(found) if found else None

    def _ratio(self, ours: str, peer: str) -> float | None:
        both = [turn for turn in self.rounds if ours in turn and peer in turn]
        return median([turn[ours].gbps / turn[peer].gbps for turn in both]) if both else None

    def _by_threads(self) -> dict[str, float]:
        turns = [turn["plain"].marks["paired"] for turn in self.rounds if "plain" in turn]
        found = [turn["to_limit_by_threads"] for turn in turns]
        shared = set.intersection(*map(set, found)) if found else set()
        return {count: median([one[count] for one in found]) for count in sorted(shared)}

    def epoch_gaps(self) -> Metrics:
        """The pause between two epochs through Ray Data, each epoch's last batch to the next."""
        turns = [turn["ray"].marks["measured"]["gaps_ms"] for turn in self.rounds if "ray" in turn]
        gaps = [gap for turn in turns for gap in turn]
        if not gaps:
            say("no epoch ended while ray was measured: give more --seconds or less --gb")
            return {"epoch_gap_ms": None}
        return {
            "epoch_gap_ms": median(gaps),
            "epoch_gap_max_ms": max(gaps),
            "epoch_gaps": len(gaps),
        }

    def memory_of_a_quarter(self) -> Metrics:
        """Our consumers' memory on a quarter of the rows: it does not follow their number."""
        made: Metrics = {}
        n = self.n // 4
        npy = make(self.folder / "quarter.npy", self.rows, n)
        for name in OURS:
            how = {"seconds": self.options.seconds, "warm": self.options.warm}
            seen = take_turn(name, self.rows, n, npy, self.folder / name, **how)
            made[f"anon_mib_{name}_quarter"] = _anon_mib(seen)
        return made


def _anon_mib(seen: Seen) -> float:
    return (seen.peak_bytes - seen.base_bytes) / MIB


def _shown(rates: dict[Any, float]) -> str:
    return ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())


def first_batch(root: Path, rounds: int) -> Metrics:
    """Time to the first batch of ten million rows, and the memory it took; a sparse file."""
    made: Metrics = {}
    # The keys without a suffix are of CLIP's rows; a batch of the largest rows alone is 22.5 MiB.
    for rows, suffix in ((TOKENS, ""), (LARGE, "_962x768"), (VECTORS, "_768")):
        npy = root / f"sparse{rows.suffix}.npy"
        try:
            make_sparse(npy, rows, BIG_ROWS)
        except OSError as error:
            say(f"no sparse file of {BIG_ROWS} rows of {rows.name} here: {error}")
            made[f"first_batch_s_10m{suffix}"] = made[f"first_batch_mib_10m{suffix}"] = None
            continue
        turns = [
            take_turn("plain", rows, BIG_ROWS, npy, root / "plain", do="first")
            for _ in range(rounds)
        ]
        npy.unlink()
        made[f"first_batch_s_10m{suffix}"] = median([t.marks["first"]["start_s"] for t in turns])
        made[f"first_batch_mib_10m{suffix}"] = median([_anon_mib(turn) for turn in turns])
        made[f"first_batch_row_10m{suffix}"] = f"{rows.name}, batch {rows.batch}"
        say(f"first batch of {BIG_ROWS} rows of {rows.name}: {_shown_first(made, suffix)}")
    return made


def _shown_first(made: Metrics, suffix: str) -> str:
    seconds, mib = made[f"first_batch_s_10m{suffix}"], made[f"first_batch_mib_10m{suffix}"]
    return f"{seconds:.3f} s, {mib:.1f} MiB"


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--gb", type=float, default=2.0, help="data of the large rows, GB")
    args.add_argument("--small-gb", type=float, default=0.25, help="data of each small kind, GB")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--seconds", type=float, default=3.0, help="measured in each turn")
    args.add_argument("--warm", type=float, default=2.0, help="seconds of a turn before that")
    args.add_argument("--peers", default=",".join(PEERS), help="those to run, with commas")
    args.add_argument("--rows", default="large,257x768,768,10m", help="tables to make, with commas")
    args.add_argument("--no-cold", action="store_true")
    args.add_argument("--minutes", type=float, default=20.0, help="that all of it may take")
    options = args.parse_args()
    asked = [name for name in options.peers.split(",") if name]
    unknown = set(asked) - set(PEERS)
    if unknown:
        sys.exit(f"no peer is called {', '.join(sorted(unknown))}: there are {', '.join(PEERS)}")
    kinds = {"large": LARGE, "257x768": TOKENS, "768": VECTORS}
    asked_rows = options.rows.split(",")
    if wrong := set(asked_rows) - set(kinds) - {"10m"}:
        sys.exit(f"--rows {','.join(sorted(wrong))}: there are {', '.join(kinds)} and 10m")
    # Contenders live in sessions of their own: told to end, we end the one that runs as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    versions, missing = find_peers(asked)
    metrics: Metrics = {"peer_versions": versions, "missing_peers": missing}
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        for name, rows in ((name, kinds[name]) for name in asked_rows if name in kinds):
            gigabytes = options.gb if rows is LARGE else options.small_gb
            _need_room(root, gigabytes * (1 + rows.cold_times + len(versions)))
            until = began + 60 * options.minutes * ROUNDS_END[name]
            table = Table(rows, rows.count(gigabytes), root, options, until)
            say(f"{table.n} rows of {rows.name}, batch {rows.batch}")
            table.prepare(list(versions))
            table.contend()
            metrics |= table.metrics(asked)
            if rows is LARGE:
                metrics |= table.epoch_gaps() | table.memory_of_a_quarter()
                if not options.no_cold:
                    metrics |= cold_pass(table)
            if not options.no_cold:
                metrics |= cold_windows(table, began + 60 * options.minutes)
            shutil.rmtree(table.folder)
        if "10m" in asked_rows:
            metrics |= first_batch(root, options.rounds)
    metrics["wall_s"] = time.monotonic() - began
    emit("stream", metrics, options.json)


def _need_room(root: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(root).free / 1e9
    if free < gigabytes:
        sys.exit(f"{free:.1f} GB free in {root}, about {gigabytes:.1f} needed: give a smaller --gb")


if __name__ == "__main__":
    main()
