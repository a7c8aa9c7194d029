"""What a batch's tensors are made of: which sources, cast to what, joined along which axis. Pure.

Every tensor is seen as (rows, lines, columns): a source that is not joined is one line; one that is
joined along an axis fills a range of columns of each line, where the lines are all axes before it.
Filling them is `raypipe.stream.copy`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from raypipe.errors import ConfigError
from raypipe.stream.reading import Source
from raypipe.stream.source import LOGICAL_DTYPES

if TYPE_CHECKING:
    import torch

_FLOATING = ("float16", "bfloat16", "float32", "float64")


class Join(NamedTuple):
    """``sources`` side by side along ``axis`` of a batch (not 0, which counts rows)."""

    sources: tuple[str, ...]
    axis: int = -1


@dataclass(frozen=True)
class Part:
    """A source's place in a tensor: columns [first, first + columns) of every line."""

    source: str
    first: int
    columns: int


@dataclass(frozen=True)
class Output:
    """One tensor of a batch: (rows, *row_shape), seen as (rows, lines, columns).

    host: dtype in the host buffer; final: dtype handed out (they differ on CUDA, where the device
    casts what came over in the narrower dtype).
    """

    name: str
    row_shape: tuple[int, ...]
    lines: int
    columns: int
    host: str
    final: str
    parts: tuple[Part, ...]

    @property
    def row_bytes(self) -> int:
        """Host bytes of one row."""
        return self.lines * self.columns * itemsize(self.host)


def itemsize(dtype: str) -> int:
    """Bytes of one number of a logical dtype."""
    return {"bool": 1, "bfloat16": 2}.get(dtype) or int("".join(filter(str.isdigit, dtype))) // 8


def lay_out(
    sources: Mapping[str, Source],
    *,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None = None,
    join: Mapping[str, Join | tuple[tuple[str, ...], int]] | None = None,
    cast_on_device: bool = False,
) -> tuple[Output, ...]:
    """The tensors of a batch of ``sources``: the joined ones, then the others, each by its name.

    Raises ConfigError for a name that is not there or is taken twice, shapes that do not fit side
    by side, and dtypes that differ in a joined tensor without a ``dtype`` to cast to.
    """
    joins = {name: Join(*given) for name, given in (join or {}).items()}
    used = [source for one in joins.values() for source in one.sources]
    for name in {*used, *(dtype if isinstance(dtype, Mapping) else ())} - {*sources, *joins}:
        raise ConfigError(f"no source {name!r} to join or cast; there are {', '.join(sources)}")
    single = {name: Join((name,), 1) for name in sources if name not in used}
    if len(set(used)) != len(used) or {*joins} & {*single}:
        raise ConfigError(
            f"join {', '.join(joins)}: a source is used twice or has a joined tensor's name; give "
            "each source once and each tensor a name of its own"
        )
    return tuple(
        _output(name, one, sources, dtype, cast_on_device)
        for name, one in {**joins, **single}.items()
    )


def _output(
    name: str,
    join: Join,
    sources: Mapping[str, Source],
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None,
    cast_on_device: bool,
) -> Output:
    finals = {_final(source, name, sources[source].dtype, dtype) for source in join.sources}
    stored = {sources[source].dtype for source in join.sources}
    if len(finals) != 1:
        raise ConfigError(
            f"joined {name} would hold {' and '.join(sorted(finals)) or 'no source'}; give the "
            "sources one dtype to be cast to"
        )
    (final,) = finals
    host = stored.pop() if cast_on_device and len(stored) == 1 else final
    shapes = [sources[source].row_shape for source in join.sources]
    if len(shapes) == 1:
        columns = math.prod(shapes[0])
        return Output(
            name, shapes[0], 1, columns, host, final, (Part(join.sources[0], 0, columns),)
        )
    axis = join.axis + len(shapes[0]) if join.axis < 0 else join.axis - 1  # of a row
    fits = {(len(s), s[:axis], s[axis + 1 :]) for s in shapes}
    if not 0 <= axis < len(shapes[0]) or len(fits) != 1:
        raise ConfigError(
            f"rows of {', '.join(f'{s} {sources[s].row_shape}' for s in join.sources)} do not fit "
            f"side by side along axis {join.axis} of a batch; axes but that one must be equal, and "
            "axis 0 counts rows"
        )
    parts, first = [], 0
    for source, shape in zip(join.sources, shapes, strict=True):
        parts.append(Part(source, first, math.prod(shape[axis:])))
        first += parts[-1].columns
    whole = (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])
    return Output(name, whole, math.prod(shapes[0][:axis]), first, host, final, tuple(parts))


def _final(
    source: str,
    output: str,
    stored: str,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None,
) -> str:
    """The dtype that ``source`` is handed out in. One for all is for floating sources only."""
    if isinstance(dtype, Mapping):
        asked = dtype.get(source, dtype.get(output))
    else:
        asked = dtype if stored in _FLOATING else None
    if asked is None:
        return stored
    name = str(asked).removeprefix("torch.")
    if name not in LOGICAL_DTYPES:
        raise ConfigError(f"dtype {name}: a batch is cast to one of {', '.join(LOGICAL_DTYPES)}")
    return name
