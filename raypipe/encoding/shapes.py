"""How one image's tokens lie, as its store declares it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raypipe.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """``prefix`` tokens (CLS, registers), then ``height`` x ``width`` patches row by row."""

    prefix: int
    height: int
    width: int
    dim: int

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.dim) < 1 or self.prefix < 0:
            raise InputError(
                f"{self} holds no patch tokens; extract a layer that keeps its patches"
            )

    @classmethod
    def of(cls, row_shape: tuple[int, ...], layout: Mapping[str, Any]) -> TokenShape:
        """From a store's row shape (n_tokens, dim) and the ``token_layout`` of its manifest.

        A layout without a grid is a sequence: positions then count along it. Raises InputError when
        shape and layout contradict each other.
        """
        if len(row_shape) != 2:
            raise InputError(
                f"rows of shape {row_shape} are no tokens; an encoder needs (n_tokens, dim) features"
            )
        n_tokens, dim = row_shape
        prefix = int(layout.get("n_prefix", 0))
        height, width = layout.get("grid") or (1, n_tokens - prefix)
        shape = cls(prefix=prefix, height=int(height), width=int(width), dim=dim)
        if shape.n_tokens != n_tokens:
            raise InputError(
                f"rows hold {n_tokens} tokens, the manifest's layout {prefix} + {height}x{width} ="
                f" {shape.n_tokens}; it was written for another shape: extract again"
            )
        return shape

    @property
    def n_tokens(self) -> int:
        """Prefix and patches together."""
        return self.prefix + self.height * self.width
