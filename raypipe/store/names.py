"""Row names of a file that is to be adopted: numbers, a text file, or a CSV column. Streamed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raypipe.errors import ConfigError, MissingInput


@dataclass(frozen=True)
class RowNames:
    """``rows`` names in row order, read anew on each iteration; ``file`` None: ``0``, ``1``, ...

    A text file has a name a line. A ``.csv`` has one column, or a first line with a column
    ``name``. Iterating raises ConfigError for an empty name or another count, MissingInput without
    the file.
    """

    rows: int
    file: Path | None = None

    def __iter__(self) -> Iterator[str]:
        if self.file is None:
            yield from map(str, range(self.rows))
            return
        count = 0
        try:
            for count, name in enumerate(self._read(self.file), 1):
                if not name:
                    raise ConfigError(f"{self.file}: name {count} is empty; give one a row")
                yield name
        except FileNotFoundError:
            raise MissingInput(
                f"{self.file} is not there; --names takes a text or CSV file"
            ) from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{self.file} cannot be read as UTF-8 text ({error})") from None
        if count != self.rows:
            raise ConfigError(
                f"{self.file} holds {count} names for {self.rows} rows; give one a row"
            )

    def check(self) -> int:
        """Bytes of all names together; raises what iterating raises."""
        if self.file is None:
            return self.rows * len(str(self.rows))
        return sum(len(name.encode()) for name in self)

    def _read(self, file: Path) -> Iterator[str]:
        with file.open(encoding="utf-8", newline="" if file.suffix == ".csv" else None) as lines:
            if file.suffix == ".csv":
                yield from self._read_csv(file, csv.reader(lines))
            else:
                yield from (line.rstrip("\n") for line in lines)

    def _read_csv(self, file: Path, lines: Iterator[list[str]]) -> Iterator[str]:
        first = next(lines, None)
        if first is None:
            return
        if "name" in first:
            column = first.index("name")
        elif len(first) == 1:
            column = 0
            yield first[0]
        else:
            raise ConfigError(
                f"{file} has {len(first)} columns and none is called 'name' in its first line; "
                "name the column of file names so"
            )
        for number, cells in enumerate(lines, 2):
            if column >= len(cells):
                raise ConfigError(f"{file}: line {number} has {len(cells)} columns; give one name")
            yield cells[column]
