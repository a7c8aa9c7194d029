"""How a demonstration fails: loudly, when what was planted was not found, or found where nothing is."""

from __future__ import annotations

from raypipe.errors import RaypipeError


class NotRecovered(RaypipeError):
    """The planted signal was not found again: something between input and report is broken."""
