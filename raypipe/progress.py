"""Progress with rate and ETA: a rich bar on a terminal, elsewhere at most one line every 10 s."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from raypipe.units import format_seconds

LINE_EVERY_S = 10.0


class Progress:
    """Counts ``total`` units of work; use it as a context manager.

    done : units finished before this run (resumed work), counted in the bar and not in the rate.
    """

    def __init__(
        self, title: str, total: int, unit: str, *, done: int = 0, stream: TextIO | None = None
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._resumed = done
        self._stream = stream or sys.stderr
        self._bar = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        if self._stream.isatty():
            self._bar = self._open_bar()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done > self._resumed:
            self._print(self.line())

    def update(self, units: int) -> None:
        """Count ``units`` more."""
        self.done += units
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate_text())
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._print(self.line())

    def note(self, text: str) -> None:
        """Print one line without breaking the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            self._print(text)

    @property
    def rate(self) -> float:
        """Units a second since this run began."""
        elapsed = time.monotonic() - self._started
        return (self.done - self._resumed) / elapsed if elapsed > 0 else 0.0

    def line(self) -> str:
        """``extract 120/240 images (50 %), 31.2 images/s, ETA 4 s``."""
        percent = 100 * self.done // max(self.total, 1)
        text = (
            f"{self.title} {self.done}/{self.total} {self.unit} ({percent} %), {self._rate_text()}"
        )
        left = self.total - self.done
        if left and self.rate > 0:
            text += f", ETA {format_seconds(left / self.rate)}"
        return text

    def _rate_text(self) -> str:
        return f"{self.rate:.3g} {self.unit}/s"

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _open_bar(self):  # type: ignore[no-untyped-def]  # rich is loaded on a terminal only
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        self._task = bar.add_task(self.title, total=self.total, completed=self.done, rate="")
        bar.start()
        return bar
