"""How far a model looks, and on which grid it works: measured on the module itself, as it stands.

``measure`` answers per axis: the *radius*, beyond which no pixel reaches an output; the *align*, the
period at which moving the image moves the result (the total stride of pooling); or why tiles cannot
give what the whole image gives. Four measurements, on images that are long on one axis:

1. A line of NaN is put at one pixel, for every phase of ``align``; the outputs that become NaN are all
   that it can reach. No weight hides a path: 0 * NaN is NaN, and ReLU and max-pooling hand NaN on.
2. The same line gets other numbers; what changes outside of 1 means that NaN was swallowed.
3. Moved by ``align`` the image must give the moved result, in float64, also with all weights positive
   (no dead ReLU hides a stride), and 1 must have that period too.
4. An image cut at aligned places must give the same at the halo's distance from the cuts, in float64:
   this sees what padding at borders does, and modules whose result depends on the image's size.

An operation that swallows NaN (``probe``) makes the measurement fail: the user then states both.
"""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from raypipe.errors import ConfigError, InputError
from raypipe.tile.grid import round_up
from raypipe.tile.probe import Probe, culprit

MOST_ALIGN = 64  # strides of 2**6; ViT patches are below too
LONGEST = 2048  # pixels of the longest image that is tried
# No longer image is tried after a pass that took more: attention takes the square of the pixels.
PATIENCE_S, PATIENCE_BYTES = 60.0, 1 << 30
CLEAR = 32  # pixels beyond the radius that are compared, at least
_STATE = "state halo and align yourself, or take blend='gaussian' or 'linear' with an overlap"


@dataclass(frozen=True, kw_only=True)
class Field:
    """What was measured, one number an axis.

    radius : pixels; align : pixels; why_not : why tiles cannot equal the whole image, "" if they can
    """

    radius: tuple[int, ...]
    align: tuple[int, ...]
    why_not: str = ""

    @property
    def exact(self) -> bool:
        """Whether tiles with this halo and align equal the whole image."""
        return not self.why_not

    @property
    def halo(self) -> tuple[int, ...]:
        """``radius`` in whole steps of ``align``."""
        return tuple(round_up(r, a) for r, a in zip(self.radius, self.align, strict=True))


class _NotLocal(Exception):
    """Says why."""


def measure(model: nn.Module, in_channels: int, dims: int = 2) -> Field:
    """Radius and alignment of ``model``, which maps (n, in_channels, *space) to (n, k, *space).

    The model is not changed; it is run some 50 to 100 times on small images, where its parameters lie.
    Raises InputError when it cannot be measured; a model that is not local comes back with the reason.
    """
    if dims not in (2, 3):
        raise ConfigError(f"dims {dims} is neither 2 nor 3; a model works on planes or on volumes")
    try:
        with Probe.of(model, in_channels, dims) as probe:
            double = probe.on(copy.deepcopy(model).double())
            if double.whole(0, double.image(0, 2 * probe.base), 0, 2 * probe.base) is None:
                raise InputError(
                    "the model refuses to run in float64, in which shifts and cuts are compared: "
                    f"{double.refusal}; leave casts such as x.float() out of it, or {_STATE}"
                )
            alive = probe.on(_all_alive(double.model))
            found = [_axis(probe, double, alive, axis) for axis in range(dims)]
    except _NotLocal as error:
        return Field(radius=(0,) * dims, align=(1,) * dims, why_not=str(error))
    radius, align = zip(*found, strict=True)
    return Field(radius=radius, align=align)


def _all_alive(double: nn.Module) -> nn.Module:
    """A copy without negative parameters and means: fed with positive numbers no ReLU is dead in it and
    nothing cancels, so that no stride is hidden by the weights that a model happens to have.
    """
    alive = copy.deepcopy(double)
    for parameter in alive.parameters():
        parameter.abs_().add_(1e-3)
    for name, buffer in alive.named_buffers():
        if name.endswith("running_mean"):
            buffer.zero_()
    return alive


def _axis(probe: Probe, double: Probe, alive: Probe, axis: int) -> tuple[int, int]:
    """(radius, align) along one axis. Raises _NotLocal, InputError."""
    radius = _first_radius(probe, axis)
    refusal = ""
    for align in _candidates():
        # Long enough that the middle is a radius off both ends after all moves and cuts.
        length = round_up(4 * radius + 6 * align + 4 * CLEAR, probe.base)
        if not all(_moves(one, axis, length, align, radius) for one in (double, alive)):
            continue
        phases = _phases(probe, axis, length, align)
        if phases is None:
            continue
        reach = max(_reach(support, at) for at, support in phases)
        felt = _felt(double, axis, length, align)
        if felt is not None:
            return max(reach, felt), align
        refusal = double.refusal
    if refusal:
        raise InputError(
            f"the model takes {length} pixels along axis {axis} but no size that its stride allows: "
            f"{refusal}; {_STATE}"
        )
    raise _NotLocal(
        f"its result depends on where a pixel lies: no shift of up to {MOST_ALIGN} pixels of axis "
        f"{axis} moves the result along (absolute positions, align_corners=True, or a resize by size)"
    )


def _first_radius(probe: Probe, axis: int) -> int:
    """Reach of the middle pixel, on an image so long that its ends are not reached."""
    length, too_much = probe.base, False
    while length < LONGEST and not too_much:
        length *= 2
        at, began, held = length // 2, time.monotonic(), _most_bytes()
        support = probe.support(axis, length, at)
        too_much = time.monotonic() - began > PATIENCE_S or _most_bytes() - held > PATIENCE_BYTES
        if not support.any():
            raise InputError(
                "the model's output does not show a NaN of its input anywhere, so how far it looks "
                f"cannot be measured; {_STATE}"
            )
        if not (support[0] or support[-1]):
            probe.check_seen(axis, length, at, support)
            return _reach(support, at)
        why = culprit(probe.model, probe, axis, length) if support.all() else ""
        if why:
            raise _NotLocal(f"{why} spreads one pixel over the whole image")
    raise _NotLocal(
        f"one pixel reaches both ends of an image of {length} pixels along axis {axis}, and no longer one "
        "was tried: attention or a mean over the image, or a field too large to be measured"
    )


def _most_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reach(support: np.ndarray, at: int) -> int:
    where = np.flatnonzero(support)
    return int(max(at - where[0], where[-1] - at, 0))


def _candidates() -> list[int]:
    """Periods to try: the powers of two, which nearly all models have, then the others."""
    powers = [2**k for k in range(MOST_ALIGN.bit_length())]
    return powers + [n for n in range(1, MOST_ALIGN + 1) if n not in powers]


def _phases(
    probe: Probe, axis: int, length: int, align: int
) -> list[tuple[int, np.ndarray]] | None:
    """(pixel, outputs it reaches) for each phase; None when ``align`` is not their period."""
    first = round_up(length // 2, align)
    if not _same(
        probe.support(axis, length, first), probe.support(axis, length, first + align), align
    ):
        return None
    phases = [(at, probe.support(axis, length, at)) for at in range(first, first + align)]
    for at, support in phases[:: max(1, align // 4)]:
        probe.check_seen(axis, length, at, support, magnitudes=(30.0,))
    return phases


def _same(support: np.ndarray, moved: np.ndarray, align: int) -> bool:
    return bool(np.array_equal(support[:-align], moved[align:]))


def _moves(double: Probe, axis: int, length: int, align: int, radius: int) -> bool:
    """Whether moving the image by ``align`` moves the result, a radius off the ends."""
    image = double.image(axis, length + align).abs()
    here, there = double.whole(axis, image, 0, length), double.whole(axis, image, align, length)
    if here is None or there is None:
        return False
    lo, hi = radius + CLEAR, length - radius - CLEAR
    return double.equal(here[:, lo + align : hi], there[:, lo : hi - align])


def _felt(double: Probe, axis: int, length: int, align: int) -> int | None:
    """How far from a cut at a multiple of ``align`` the result differs from the uncut image's; None
    when the model refuses the size. Raises _NotLocal when that is so everywhere.
    """
    image = double.image(axis, length)
    whole = double.whole(axis, image, 0, length)
    worst = 0
    for left, right in ((align, 0), (0, align), (3 * align, 2 * align)):
        part = double.whole(axis, image, left, length - left - right)
        if whole is None or part is None:
            return None
        off = double.differing(whole[:, left : length - right], part)
        middle = part.shape[1] // 2
        near, far = np.flatnonzero(off[:middle]), np.flatnonzero(off[middle:][::-1])
        worst = max([worst, *(near + 1), *(far + 1)])
        if worst >= middle - CLEAR // 2:
            raise _NotLocal(
                f"its result depends on the size of the image along axis {axis}, far from its ends too"
            )
    return int(worst)


def stated(halo: int | Sequence[int], align: int | Sequence[int], dims: int) -> Field:
    """What the user says of a model that was not measured. Raises ConfigError."""
    numbers = []
    for name, value in (("halo", halo), ("align", align)):
        row = (value,) * dims if isinstance(value, int) else tuple(value)
        if len(row) != dims or min(row) < (name == "align"):
            raise ConfigError(
                f"{name} {value!r} is not {dims} numbers of pixels; give one, or one an axis"
            )
        numbers.append(row)
    return Field(radius=numbers[0], align=numbers[1])
