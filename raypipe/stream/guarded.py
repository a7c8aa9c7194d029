"""Maps of files that may be cut short under them: zeros and a mark instead of the end by SIGBUS.

Touching a map beyond the end of its file is SIGBUS. This process's handler lays zero pages over the
rest of a map that `guard` was told of, and marks it: whoever copied from it looks at `cut_at` after
the copy, and gives nothing of it away. Any other SIGBUS is left to the handler that was there
before (none: the process ends; faulthandler's, Ray's), by putting it back and returning.

The handler is Python, which waits for the GIL. In a copy from a guarded map it may: the fault is
synchronous, and the thread holds no lock but perhaps the GIL itself. So only what reads a map in
such copies may guard it: `raypipe.stream.mapped`. Where there is no guard (anything but Linux with
glibc on x86-64 and arm64) it reads in another way.

Limits: a handler that somebody sets in the middle of a copy has that copy unguarded. A thread that
is hit by SIGBUS elsewhere, while it holds a lock that the GIL's holder waits for, hangs instead.
Ctrl-C that comes in the very copy of the main thread that faults is printed and lost.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import mmap
import os
import platform
import sys
import threading

# Of Linux, the same on both machines.
_MACHINES = ("x86_64", "aarch64")
_SA_SIGINFO = 4
_SIGBUS = 7
_BUS_ADRERR = 2  # si_code: a page that the file does not have, or the disk does not give
_MAP_FIXED = 16
_SI_CODE, _SI_ADDR = 8, 16  # bytes into siginfo_t


class GuardedRange:
    """Addresses [start, end) of a map, whole pages. Release them before they are unmapped.

    cut_at : the address of the last fault, from whose page on there are zeros; None: no fault yet.
    """

    def __init__(self, start: int, end: int, handler: _Handler) -> None:
        self.start, self.end = start, end
        self.cut_at: int | None = None
        #: Put the handler in place again if another has been set (faulthandler.enable, ray.init).
        #: To be called before a copy: it takes 1 to 2 microseconds.
        self.renew = handler.install

    def release(self) -> None:
        """The addresses may be used for something else from here on."""
        _ranges.pop(id(self), None)


# Changed by single operations only, which no fork and no finalizer can find half done.
_ranges: dict[int, GuardedRange] = {}
_making = threading.Lock()  # two handlers would take turns to be in place


def guard(start: int, n_bytes: int) -> GuardedRange | None:
    """Have SIGBUS in the map of ``n_bytes`` from the address ``start`` on become zeros and a mark.

    None: not on this system.
    """
    with _making:
        handler = _handler()
    if handler is None or not handler.install():
        return None
    page = mmap.PAGESIZE
    found = GuardedRange(start, start + (n_bytes + page - 1) // page * page, handler)
    _ranges[id(found)] = found
    return found


class _Action(ctypes.Structure):
    """struct sigaction of glibc on `_MACHINES`."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _Handler:
    """SIGBUS of this process."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._raise, self._mmap = libc["raise"], libc.mmap
        self._sigaction = ctypes.PyDLL(None).sigaction  # so short that the GIL is kept
        self._sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self._mmap.argtypes = [
            *(ctypes.c_void_p, ctypes.c_size_t),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
        ]
        self._mmap.restype = ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        callback = kind(self._on_fault)
        # For ever: others may have kept its address, to put it back after theirs.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(callback))
        self._address = ctypes.cast(callback, ctypes.c_void_p).value
        # Who was there before, the latest last. Each is put back once: two handlers that each
        # remember the other would call each other for ever.
        self._previous: list[_Action] = []
        self._left = False
        self._now = _Action()
        self._place = ctypes.byref(self._now)
        atexit.register(self._leave)

    def install(self) -> bool:
        """Make it the present handler, if it is not; whether it is."""
        if self._left or self._is_present():
            return not self._left
        ours, old = _Action(handler=self._address, flags=_SA_SIGINFO), _Action()
        if self._sigaction(_SIGBUS, ctypes.byref(ours), ctypes.byref(old)):
            return False
        if old.handler != self._address:  # no other thread was faster
            others = [action for action in self._previous if action.handler != old.handler]
            self._previous = [*others, old]
        return self._is_present()

    def _is_present(self) -> bool:
        failed = self._sigaction(_SIGBUS, None, self._place)
        now = self._now
        return not failed and now.handler == self._address and bool(now.flags & _SA_SIGINFO)

    def _on_fault(self, number: int, info: int, context: int) -> None:
        code = 0
        try:
            code = ctypes.c_int.from_address(info + _SI_CODE).value
            if code == _BUS_ADRERR and self._cover(
                ctypes.c_size_t.from_address(info + _SI_ADDR).value
            ):
                return  # the instruction is done again and reads zeros
        except Exception:  # it would be printed, and the instruction done again for ever
            pass
        self._pass_on(sent=code <= 0)

    def _cover(self, address: int) -> bool:
        """Zeros from the page of ``address`` to the end of its range; whether it is in one."""
        for found in list(_ranges.values()):
            if found.start <= address < found.end:
                found.cut_at = address  # before the zeros: who reads them then finds the mark
                page = address & -mmap.PAGESIZE
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
                size = found.end - page
                return bool(self._mmap(page, size, mmap.PROT_READ, flags, -1, 0) == page)
        return False

    def _pass_on(self, *, sent: bool) -> None:
        """Put the previous handler back: a fault comes again, what was ``sent`` is sent again."""
        previous = self._previous.pop() if self._previous else _Action()  # zeros: SIG_DFL
        self._sigaction(_SIGBUS, ctypes.byref(previous), None)
        if sent:  # blocked until this handler returns
            self._raise(_SIGBUS)

    def _leave(self) -> None:
        """No Python in a handler after the interpreter's end."""
        self._left = True
        if self._is_present():
            self._pass_on(sent=False)


@functools.cache
def _handler() -> _Handler | None:
    if sys.platform != "linux" or sys.maxsize < 2**32 or platform.machine() not in _MACHINES:
        return None
    try:
        is_glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (OSError, ValueError):  # musl knows no such name
        return None
    return _Handler() if is_glibc else None
