"""Text <-> quantities, at the edge of the program: "24GiB" <-> bytes, seconds -> "3 min 05 s".

Inside the program bytes are ints named ``*_bytes`` and times are float seconds.
"""

from __future__ import annotations

import re

from raypipe.errors import ConfigError

_FACTORS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _FACTORS[f"{_prefix}IB"] = 1024**_power
    _FACTORS[f"{_prefix}B"] = 1000**_power
    _FACTORS[_prefix] = 1024**_power  # bare "8G" follows Slurm and the JVM: binary

_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*\Z")


def parse_bytes(text: str | int) -> int:
    """Bytes in ``text``: 1024-based for KiB/K, 1000-based for KB; an int passes through.

    Raises ConfigError for anything else, and for negative values.
    """
    if isinstance(text, int):
        if text < 0:
            raise ConfigError(f"size {text} is negative; give a number of bytes or e.g. 24GiB")
        return text
    match = _PATTERN.match(text)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _FACTORS:
        raise ConfigError(
            f"size {text!r} is not a number with a unit of bytes; write e.g. 24GiB, 500MB"
        )
    return int(float(match.group(1)) * _FACTORS[unit])


def format_bytes(n_bytes: float) -> str:
    """``n_bytes`` with a binary unit and three significant digits: ``1.50 GiB``."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{int(value)} B"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """``seconds`` in words that fit: ``0.4 s``, ``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
