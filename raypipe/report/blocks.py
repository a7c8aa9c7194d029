"""What a page is made of: sections of blocks, plain values that the template spells out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Card:
    """A number to see first: ``value`` large, ``label`` above, ``detail`` below it."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards side by side."""

    cards: Sequence[Card]
    kind: ClassVar[str] = "cards"


@dataclass(frozen=True)
class Note:
    """A sentence that must not be missed."""

    text: str
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Picture:
    """A figure as a data: address, what it shows in words, and its caption."""

    uri: str
    alt: str
    caption: str
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Table:
    """Cells as text; columns from ``numeric_from`` on are right-aligned numbers.

    folded : show the caption only, the table on a click
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric_from: int = 1
    folded: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Facts:
    """Name and value pairs."""

    pairs: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Code:
    """Text to be copied, as it stands; folded below its caption."""

    caption: str
    text: str
    kind: ClassVar[str] = "code"


Block = Cards | Note | Picture | Table | Facts | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str = ""
