"""Budgets as a hog meets them: how far it gets, how long it lives, what watching costs, who is hit.

    python benchmarks/memory.py [--kills 20] [--maps 20] [--seconds 10]

overshoot_mib_p100    : the largest true peak of a killed process (the kernel's own high-water mark,
                        file pages taken off) less its budget, in MiB; below 0 it stayed inside
allocation_gb_s_KIND  : by a process that nobody watches. huge: 2 MiB pages, on all cores, in memory
                        that another process has just let go
kill_latency_ms_p50   : from the last look that found it inside its limit until it is gone
actor_cpu_share_16    : of one core, all threads of the actor, with 16 workers that work (take and
                        give back memory without a pause), so near their hard limits that each is
                        looked at every 5 ms; _idle: the same, but they only hold memory, so that
                        each wake-up is one of a sleeping core; _at_soft, _at_half: working, 550 MiB
                        and 1792 MiB away, as at the soft limit and half of a budget of 4 GiB;
                        _none: nobody is watched, only Ray's own threads, on idle cores
watch_cpu_share_16    : the part of it that is the watch: the thread that polls
wake_cpu_share_16     : of a process that only wakes every 5 ms at the same priority beside them, and
                        looks at nobody: this machine's price of a wake-up, half of it or more here
false_kills           : of processes that map and read a file of 4 times their budget
throughput_ratio_on_off : batches with budgets on against off, 100 turns of 0.4 s each; _spread:
                        half of its 95 % interval

The hogs are processes of this script, put under the node's real memory actor by their ids.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import ray
from memory_stream import throughput_ratio

from raypipe.cluster.node_memory import node_actor
from raypipe.cluster.session import open_session
from raypipe.memory.policy import Limits
from raypipe.memory.probe import ProcessProbe
from raypipe.memory.records import Ask, node_folder, slot_path
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Slot
from raypipe.memory.verdict import Verdict, find
from raypipe.memory.watch import POLL_S

GIB, MIB = 1024**3, 1024**2
KINDS = ("numpy", "torch", "bytearray", "huge")
HOG = Path(__file__).with_name("memory_hog.py")
BUDGET = 2 * GIB
WANTED = 8 * GIB
WAIT_S = 60.0


@dataclass(frozen=True)
class Kill:
    """One killed hog, in bytes and seconds."""

    peak_bytes: int
    latency_s: float


class Shares(NamedTuple):
    """Of one core: all threads of the actor; the one that looks; one that only wakes as often."""

    actor: float
    watch: float
    wake: float


class Hog:
    """A child process that has said that it is ready. file_bytes : resident before its work."""

    def __init__(self, kind: str, size: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HOG), kind, str(size)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pidfd = os.pidfd_open(self.process.pid)
        self.anon_bytes, self.file_bytes = (int(word) for word in self.line().split())

    def line(self) -> str:
        """What it says next; empty when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def go(self) -> None:
        """Let it begin, or end."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def wait(self) -> tuple[int, int, float]:
        """(exit code, peak of its resident bytes, when it was gone)."""
        if not select.select([self.pidfd], [], [], WAIT_S)[0]:
            self.process.kill()
            raise SystemExit(f"a hog still runs after {WAIT_S:.0f} s")
        gone = time.time()
        _, status, used = os.wait4(self.process.pid, 0)
        os.close(self.pidfd)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode, used.ru_maxrss * 1024, gone


class Node:
    """The memory actor of this node, with verdicts in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node_id = ray.get_runtime_context().get_node_id()
        self.actor = node_actor(self.node_id)
        self.state = ray.get(self.actor.state.remote(), timeout=WAIT_S)

    @contextmanager
    def watching(self, hog: Hog, budget_bytes: int) -> Iterator[Registration]:
        """``hog`` under its budget."""
        with ProcessProbe(hog.process.pid) as probe:
            start = probe.start_ticks
        path = slot_path(node_folder(self.node_id), hog.process.pid, start)
        Slot.create(path).close()
        told = Registration(
            pid=hog.process.pid, start_ticks=start, budget_bytes=budget_bytes, label="hog",
            slot_path=path, verdict_dir=self.folder,
        )  # fmt: skip
        ask = Ask(registration=told, capacity_bytes=1024 * GIB)
        answer = ray.get(self.actor.admit.remote(ask), timeout=WAIT_S)
        if answer.state != "granted":
            raise SystemExit(f"not granted: {answer.text}")
        try:
            yield told
        finally:
            ray.get(self.actor.leave.remote(ask.holder), timeout=WAIT_S)

    def shares(self, seconds: float) -> Shares:
        """Over the next ``seconds``."""
        wakes = Hog("wake", POLL_S)
        wakes.go()
        before, began = self._cpu_s(wakes.process.pid), time.perf_counter()
        time.sleep(seconds)
        after, took = self._cpu_s(wakes.process.pid), time.perf_counter() - began
        wakes.process.kill()
        wakes.wait()
        return Shares(*((b - a) / took for a, b in zip(before, after, strict=True)))

    def _cpu_s(self, wakes: int) -> tuple[float, float, float]:
        """Processor seconds as ``Shares`` has them, kernel time included, by the scheduler."""
        tasks = Path(f"/proc/{self.state['pid']}/task").iterdir()
        used = {task.name: _scheduled_s(task) for task in tasks}
        watch = used[str(self.state["watch_thread"])]
        return sum(used.values()), watch, _scheduled_s(Path(f"/proc/{wakes}"))

    def verdict(self, told: Registration) -> Verdict | None:
        """On a process that has ended."""
        ray.get(self.actor.verdict_of.remote(told.pid), timeout=WAIT_S)  # waits for the writing
        return find(self.folder, told.pid, told.start_ticks)


def _scheduled_s(task: Path) -> float:
    return int((task / "schedstat").read_text().split()[0]) / 1e9


def warm_pages() -> None:
    """Leave memory behind that the machine's own host has given, as huge pages.

    A virtual machine gives free memory back within seconds; the first touch of it afterwards waits
    for the host, at a tenth of the speed at which the kernel zeroes pages.
    """
    warmer = Hog("huge", 6 * GIB)
    warmer.go()
    warmer.wait()


def kill(node: Node, kind: str) -> Kill:
    """Let one hog take four times its budget."""
    hog = Hog(kind, WANTED)
    if kind == "huge":
        warm_pages()
    with node.watching(hog, BUDGET) as told:
        time.sleep(0.1)  # its looks have settled to what its distance asks for
        hog.go()
        code, peak, gone = hog.wait()
        verdict = node.verdict(told)
    if code != -9 or verdict is None:
        raise SystemExit(f"{kind}: exit code {code}, verdict {verdict}: it was not ended by us")
    common.say(
        f"{kind}: peak {(peak - hog.file_bytes) / MIB:.0f} MiB of {BUDGET / MIB:.0f}, seen at "
        f"{verdict.usage_bytes / MIB:.0f}, after {verdict.unseen_s * 1e3:.1f} ms unseen, gone "
        f"{(gone - verdict.when) * 1e3:.1f} ms later"
    )
    return Kill(peak - hog.file_bytes, verdict.unseen_s + gone - verdict.when)


def kills(node: Node, count: int) -> dict[str, float]:
    """``count`` kills of each kind."""
    metrics: dict[str, float] = {}
    every: list[Kill] = []
    for kind in KINDS:
        free = Hog(kind, WANTED // 4)
        if kind == "huge":
            warm_pages()
        free.go()
        metrics[f"allocation_gb_s_{kind}"] = WANTED / 4 / 1e9 / float(free.line().split()[0])
        free.wait()
        found = [kill(node, kind) for _ in range(count)]
        every += found
        metrics[f"overshoot_mib_p100_{kind}"] = max(_overshoot_mib(found))
    latencies = sorted(one.latency_s * 1e3 for one in every)
    return metrics | {
        "kills": len(every),
        "overshoot_mib_p100": max(_overshoot_mib(every)),
        "kill_latency_ms_p50": statistics.median(latencies),
        "kill_latency_ms_p100": latencies[-1],
    }


def _overshoot_mib(found: Sequence[Kill]) -> list[float]:
    return [(one.peak_bytes - BUDGET) / MIB for one in found]


def cpu_share(
    node: Node, budget_bytes: int, headroom_bytes: int, seconds: float, kind: str = "churn"
) -> Shares:
    """Of one core, the actor's with 16 workers that far from their hard limits."""
    probe = Hog("hold", 0)
    held = max(0, Limits.of(budget_bytes).hard_bytes - headroom_bytes - probe.anon_bytes)
    probe.process.kill()
    probe.wait()
    with ExitStack() as stack:
        hogs = [Hog(kind, held) for _ in range(16)]
        for hog in hogs:
            stack.enter_context(node.watching(hog, budget_bytes))
            hog.go()
            hog.line()
        time.sleep(2.0)  # looks near a limit are compiled by then
        shares = node.shares(seconds)
        for hog in hogs:
            hog.process.kill()
            hog.wait()
    return shares


def false_kills(node: Node, count: int, folder: Path) -> int:
    """Processes ended while they read a mapped file of 4 times their budget."""
    budget = GIB // 2
    path = folder / "large.bin"
    with path.open("wb") as file:
        file.truncate(4 * budget)  # holes are pages of the cache like any other once they are read
    ended = 0
    for _ in range(count):
        hog = Hog("map", path)
        with node.watching(hog, budget) as told:
            hog.go()
            said = hog.line().split()
            code = hog.wait()[0]
            wrong = code != 0 or node.verdict(told) is not None
        if not wrong and int(said[1]) < 3.5 * budget:
            raise SystemExit(f"only {int(said[1]) / MIB:.0f} MiB were resident: no test of it")
        ended += wrong
    path.unlink()
    return ended


def main() -> None:
    """Run all parts; ``throughput`` last, with nothing else beside it."""
    parser = common.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--maps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each share")
    options = parser.parse_args()
    metrics: dict[str, Any] = {}
    with open_session(), tempfile.TemporaryDirectory() as folder:
        node = Node(Path(folder))
        common.say(f"the actor watches with {node.state['priority']}")
        nobody = node.shares(options.seconds)
        share = partial(cpu_share, node, seconds=options.seconds)
        cases = {
            "": share(GIB, 70 * MIB),
            "_idle": share(GIB, 70 * MIB, kind="hold"),
            "_at_soft": share(GIB, 550 * MIB),
            "_at_half": share(2 * GIB + 128 * MIB, 1792 * MIB),
        }
        metrics["actor_cpu_share_none"] = nobody.actor
        for case, found in cases.items():
            metrics[f"actor_cpu_share_16{case}"] = found.actor
            metrics[f"watch_cpu_share_16{case}"] = found.watch
            metrics[f"wake_cpu_share_16{case}"] = found.wake
        common.say(str(metrics))
        metrics |= kills(node, options.kills)
        metrics["false_kills"] = false_kills(node, options.maps, Path(folder))
        common.say(str(metrics))
        metrics["looks"] = ray.get(node.actor.state.remote(), timeout=WAIT_S)["looks"]
        ratio, spread = throughput_ratio(Path(folder))
        metrics |= {"throughput_ratio_on_off": ratio, "throughput_ratio_spread": spread}
    metrics["priority"] = node.state["priority"]
    common.emit("memory", metrics, options.json)


if __name__ == "__main__":
    main()
