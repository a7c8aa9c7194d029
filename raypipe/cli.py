"""The command line: ``raypipe COMMAND …``; jobs/ scripts come in through the same ``entry``.

Each command is a configuration class and a run function. Nothing heavy is imported before the
command is known. Exit codes are those of ``raypipe.errors``.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from raypipe import config as configs
from raypipe.errors import Interrupted, RaypipeError, UnknownName, in_one_line
from raypipe.launch import LaunchConfig, open_prospect, open_runner


@dataclasses.dataclass(frozen=True)
class Command:
    """Where a command's configuration class and run function live ("module:name").

    on_runner : the function takes a runner as its second argument.
    """

    config: str
    run: str
    on_runner: bool
    help: str


COMMANDS = {
    "demo": Command(
        "raypipe.demo:DemoConfig", "raypipe.demo:demo", True, "make data, extract, train, report"
    ),
    "doctor": Command(
        "raypipe.doctor:DoctorConfig", "raypipe.doctor:doctor", True, "limits, GPUs, Ray, budgets",
    ),
    "extract": Command(
        "raypipe.extract.config:ExtractConfig", "raypipe.extract.run:extract", True,
        "images -> memory-mapped features",
    ),
    "encode fit": Command(
        "raypipe.encoding.config:FitConfig", "raypipe.encoding.run:fit", True,
        "features -> brain encoder",
    ),
    "encode evaluate": Command(
        "raypipe.encoding.config:EvaluateConfig", "raypipe.encoding.assess:evaluate", False,
        "score an encoder per vertex and ROI",
    ),
    "encode predict": Command(
        "raypipe.encoding.config:PredictConfig", "raypipe.encoding.assess:predict", False,
        "write predicted responses of a split",
    ),
    "segment fit": Command(
        "raypipe.segment.config:SegmentFitConfig", "raypipe.segment.run:fit", True,
        "images and masks -> segmentation network",
    ),
    "segment evaluate": Command(
        "raypipe.segment.config:SegmentEvaluateConfig", "raypipe.segment.assess:evaluate", False,
        "score a network on whole pictures",
    ),
    "segment predict": Command(
        "raypipe.segment.predict:SegmentPredictConfig", "raypipe.segment.predict:predict", True,
        "apply a network to images of any size",
    ),
    "fmri roi": Command(
        "raypipe.fmri.config:RoiConfig", "raypipe.fmri.commands:roi", True,
        "fMRI -> cleaned time series of regions",
    ),
    "fmri mvpa": Command(
        "raypipe.fmri.config:MvpaJobConfig", "raypipe.fmri.commands:mvpa", True,
        "decode labels from regions, test the group",
    ),
    "fmri searchlight": Command(
        "raypipe.fmri.searchlight.job:SearchlightJobConfig",
        "raypipe.fmri.searchlight.run:run_searchlight", True,
        "map what is decoded around every voxel",
    ),
    "fmri betas": Command(
        "raypipe.fmri.glm.job:BetasConfig", "raypipe.fmri.glm.run:betas", True,
        "a pattern a trial, or maps of conditions",
    ),
    "store info": Command(
        "raypipe.store.commands:InfoConfig", "raypipe.store.commands:info", False,
        "what a store holds, or how far it is",
    ),
    "store verify": Command(
        "raypipe.store.commands:VerifyConfig", "raypipe.store.commands:verify_stores", False,
        "check every byte against the manifest",
    ),
    "store adopt": Command(
        "raypipe.store.commands:AdoptConfig", "raypipe.store.commands:adopt_file", False,
        "make a store of a plain .npy where it lies",
    ),
    "store export": Command(
        "raypipe.store.copy_commands:ExportConfig", "raypipe.store.copy_commands:export", False,
        "write npy, Parquet, Zarr v3 or WebDataset",
    ),
    "store replicate": Command(
        "raypipe.store.copy_commands:ReplicateConfig",
        "raypipe.store.copy_commands:replicate", False,
        "copy stores to a local disk",
    ),
    "store place": Command(
        "raypipe.store.place_commands:PlaceConfig", "raypipe.store.place_commands:place", False,
        "say that stores lie on one node's disk",
    ),
    "report": Command(
        "raypipe.report.commands:ReportConfig", "raypipe.pages:report", False,
        "rebuild report.html from a run folder",
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        from raypipe import __version__

        print(__version__)
        return 0
    name = " ".join(args[:2]) if " ".join(args[:2]) in COMMANDS else args[0]
    if name not in COMMANDS and args[1:] in (["-h"], ["--help"]) and _group(args[0]):
        print(usage(args[0]))
        return 0
    if name not in COMMANDS:
        return guarded(lambda: _unknown(args))
    command = COMMANDS[name]
    rest = args[len(name.split()) :]
    return guarded(
        lambda: _run(
            _load(command.config), _load(command.run), rest, f"raypipe {name}", command.on_runner
        )
    )


def entry(cls: type, run: Callable[..., Any], *, on_runner: bool = True) -> int:
    """What a script in jobs/ is: a configuration class, a run function, this process's flags."""
    return guarded(lambda: _run(cls, run, sys.argv[1:], sys.argv[0], on_runner))


def guarded(action: Callable[[], Any]) -> int:
    """Call ``action``; turn what it raises into one line and an exit code.

    RAYPIPE_TRACEBACK=1 prints the traceback too.
    """
    try:
        action()
    except RaypipeError as error:
        return _fail(in_one_line(error), error.exit_code)
    except KeyboardInterrupt:
        stopped = Interrupted("interrupted; what was committed is kept: the same command resumes")
        return _fail(str(stopped), stopped.exit_code)
    except BrokenPipeError:  # the reader of our output left, perhaps before the work was done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        step = "make room" if full else "check the path and its permissions"
        return _fail(
            f"{error.filename or 'a file'}: {error.strerror or error}; {step}", 3 if full else 2
        )
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return _fail(
            f"{type(error).__name__}: {lines[0]}; this is a fault of raypipe's own or of its "
            "surroundings: RAYPIPE_TRACEBACK=1 shows where",
            RaypipeError.exit_code,
        )
    return 0


def usage(group: str = "") -> str:
    """The table of commands, or of one group of them."""
    lines = ["usage: raypipe COMMAND [--help] [--config FILE.yaml] [options]", ""]
    lines += [f"  {name:<16} {COMMANDS[name].help}" for name in _group(group) or COMMANDS]
    return "\n".join(lines)


def _group(first: str) -> list[str]:
    """The commands of two words that begin with ``first``."""
    return [name for name in COMMANDS if name.startswith(f"{first} ")]


def _run(
    cls: type, run: Callable[..., Any], args: Sequence[str], prog: str, on_runner: bool
) -> None:
    description = (cls.__doc__ or "").strip()
    if not on_runner:
        run(configs.parse(cls, args, prog=prog, description=description))
        return
    both = dataclasses.make_dataclass(
        "Options", [("job", cls), ("launch", LaunchConfig)], frozen=True, kw_only=True
    )
    options: Any = configs.parse(both, args, prog=prog, description=description)
    dry = getattr(options.job, "dry_run", False)
    if dry and not getattr(cls, "rehearses", False):  # nothing is computed: no cluster is needed
        if not getattr(cls, "plans_memory", False):
            run(options.job, None)
            return
        with open_prospect(options.launch, configs.only_from_file(args)) as prospect:
            run(options.job, prospect)
        return
    with open_runner(options.launch, configs.only_from_file(args)) as runner:
        run(options.job, runner)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _unknown(args: Sequence[str]) -> None:
    if _group(args[0]):
        raise UnknownName.of("command", " ".join(args[:2]), _group(args[0]), "see raypipe --help")
    raise UnknownName.of("command", args[0], COMMANDS, "see raypipe --help")


def _fail(message: str, code: int) -> int:
    if os.environ.get("RAYPIPE_TRACEBACK"):
        traceback.print_exc()
    print(f"raypipe: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
