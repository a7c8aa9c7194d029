"""Sizes and times as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("24GiB", 24 * 2**30),
        ("500 MB", 500_000_000),
        ("1.5k", 1536),
        ("7", 7),
        ("0b", 0),
        ("2TB", 2 * 10**12),
        (12, 12),
    ],
)
def test_parse_bytes(text: str | int, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "1.2.3", "5 parsecs", "1e3", -1])
def test_parse_bytes_refuses(text: str | int) -> None:
    with pytest.raises(ConfigError, match=r"give|write"):
        parse_bytes(text)


@given(st.integers(0, 2**50))
def test_format_bytes_is_within_a_percent(n_bytes: int) -> None:
    assert parse_bytes(format_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.01)


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (0.43, 42, 59.7, 185, 3599.9, 7620)] == [
        "0.4 s",
        "42 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
    ]
