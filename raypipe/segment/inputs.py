"""What was found as the files were read, kept with the run: a run that goes on reads none of them again.

    RUN/inputs.json   what was asked; each file's size, time of change and sampled content; what came of
                      it: pictures and their splits, normalisation, digest of all bytes

It counts while the same is asked of the same files. A sample is of 16 blocks of 64 KiB, so of a larger
file that kept its size and its time of change not every change is seen; ``--no-resume`` reads all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raypipe.errors import MissingInput, StoreCorrupt
from raypipe.read.sample import content_sample, file_state
from raypipe.report.saved import read_json, write_json
from raypipe.segment.normalise import Normalisation
from raypipe.segment.pictures import Picture

INPUTS_FILE = "inputs.json"
_FORMAT = 1
# [bytes, nanoseconds of the last change, digest of a sample], by path.
States = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """asked : all that the rest depends on beside the files, as plain values. digest : of the bytes of
    what trains and validates, and of its parts.
    """

    asked: Mapping[str, Any]
    states: States
    pictures: tuple[Picture, ...]
    normalisation: Normalisation
    digest: str


def states_of(paths: Iterable[Path]) -> States:
    """Of each file as it is now. Raises MissingInput."""
    found: States = {}
    for path in paths:
        if str(path) not in found:
            try:
                n_bytes, changed = file_state(path)
                sample = content_sample(path, n_bytes)
            except OSError as error:
                raise MissingInput(
                    f"{path} cannot be read ({error.strerror}); mend the path"
                ) from error
            found[str(path)] = [n_bytes, changed, sample]
    return found


def keep(run_dir: Path, inputs: Inputs) -> None:
    """Write RUN/inputs.json."""
    fields = {
        "format": _FORMAT,
        "asked": inputs.asked,
        "files": inputs.states,
        "pictures": [as_dict(picture) for picture in inputs.pictures],
        "normalisation": asdict(inputs.normalisation),
        "digest": inputs.digest,
    }
    write_json(run_dir / INPUTS_FILE, fields)


def recall(run_dir: Path, asked: Mapping[str, Any], states: States) -> Inputs | None:
    """What `keep` wrote, if it was of ``asked`` and of just these files. Raises StoreCorrupt."""
    path = run_dir / INPUTS_FILE
    if not path.is_file():
        return None
    remedy = "remove it, and the files are read again"
    fields = read_json(path, remedy)
    if (fields.get("format"), fields.get("asked"), fields.get("files")) != (_FORMAT, asked, states):
        return None
    try:
        return Inputs(
            asked=asked,
            states=states,
            pictures=tuple(from_dict(one) for one in fields["pictures"]),
            normalisation=Normalisation.from_dict(fields["normalisation"]),
            digest=fields["digest"],
        )
    except (KeyError, TypeError) as error:
        raise StoreCorrupt(f"{path} lacks {error}; {remedy}") from error


def kept_digest(run_dir: Path, pictures: Iterable[Picture]) -> str | None:
    """The digest of RUN/inputs.json, if the files of ``pictures`` are in it and unchanged."""
    path = run_dir / INPUTS_FILE
    if not path.is_file():
        return None
    fields = read_json(path, "remove it, and the files are read again")
    files, now = fields.get("files", {}), states_of(files_of(pictures))
    same = fields.get("format") == _FORMAT and all(files.get(p) == now[p] for p in now)
    return str(fields["digest"]) if same else None


def files_of(pictures: Iterable[Picture]) -> list[Path]:
    """Images and masks, each once, in their order."""
    return list(dict.fromkeys(path for p in pictures for path in (p.image, p.mask)))


def as_dict(picture: Picture) -> dict[str, Any]:
    """As plain values."""
    return {
        "image": str(picture.image),
        "mask": str(picture.mask),
        "frame": picture.frame,
        "rows": list(picture.rows),
        "cols": list(picture.cols),
        "split": picture.split,
        "channels": picture.channels,
        "axes": picture.axes,
    }


def from_dict(fields: Mapping[str, Any]) -> Picture:
    """What `as_dict` made."""
    spans = {k: (int(fields[k][0]), int(fields[k][1])) for k in ("rows", "cols")}
    return Picture(
        image=Path(fields["image"]), mask=Path(fields["mask"]), frame=fields["frame"],
        rows=spans["rows"], cols=spans["cols"], split=fields["split"],
        channels=fields["channels"], axes=fields.get("axes"),
    )  # fmt: skip
