"""Readouts: which query feeds which vertex, and the masked linear layer that sums them.

``rois_all`` has a query for every ROI of a hemisphere and one for the vertices in none; ``hemis``
one a hemisphere. Another readout (voxels, streams, one family) is one more function in READOUTS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from raypipe.errors import InputError, UnknownName

HEMIS = ("lh", "rh")
NONE = "none"  # the query of the vertices in no ROI

Masks = NDArray[np.bool_]
RoiMasks = Mapping[str, Mapping[str, Masks]]  # hemisphere -> ROI -> (V,) bool


@dataclass(frozen=True, eq=False)
class Readout:
    """Queries and the vertices that each feeds.

    queries : names, all of lh before all of rh, e.g. "lh V1v"
    masks   : hemisphere -> (n_queries of it, V) bool; each vertex is fed by at least one query
    """

    queries: tuple[str, ...]
    masks: Mapping[str, Masks]

    def __post_init__(self) -> None:
        n_queries = sum(len(mask) for mask in self.masks.values())
        if n_queries != len(self.queries):
            raise InputError(f"{len(self.queries)} query names for {n_queries} rows of masks")
        for hemi, mask in self.masks.items():
            fed = np.asarray(mask, bool).sum(axis=0)
            if not fed.size or fed.min() < 1:
                raise InputError(
                    f"{hemi}: vertex {int(fed.argmin()) if fed.size else 0} is fed by no query; add"
                    " a query for the vertices in no ROI"
                )

    @property
    def digest(self) -> str:
        """xxh3_128 of queries and masks: trained weights lie in an order that both decide."""
        digest = xxhash.xxh3_128(repr(self.queries).encode())
        for hemi in HEMIS:
            mask = np.ascontiguousarray(self.masks[hemi])
            digest.update(f"{hemi} {mask.shape}".encode())
            digest.update(mask.data)
        return digest.hexdigest()

    def n_vertices(self, hemi: str) -> int:
        """Vertices of one hemisphere."""
        return int(self.masks[hemi].shape[1])


def rois_all(rois: RoiMasks, n_vertices: Mapping[str, int]) -> Readout:
    """A query for every ROI that has a vertex, and one for the vertices in none.

    An ROI that this subject lacks gets no query: it would be trained by nothing.
    """
    names: list[str] = []
    masks: dict[str, Masks] = {}
    for hemi in HEMIS:
        present = {roi: mask for roi, mask in rois.get(hemi, {}).items() if mask.any()}
        rows = np.zeros((0, n_vertices[hemi]), bool)
        if present:
            rows = np.stack(list(present.values()))
        outside = np.asarray(rows.sum(axis=0) == 0)
        if outside.any():
            rows = np.concatenate([rows, outside[None]])
        names += [f"{hemi} {roi}" for roi in [*present, NONE][: len(rows)]]
        masks[hemi] = rows
    return Readout(tuple(names), masks)


def hemis(rois: RoiMasks, n_vertices: Mapping[str, int]) -> Readout:
    """One query a hemisphere, feeding all of its vertices; ROIs are not needed."""
    return Readout(HEMIS, {hemi: np.ones((1, n_vertices[hemi]), bool) for hemi in HEMIS})


READOUTS: dict[str, Callable[[RoiMasks, Mapping[str, int]], Readout]] = {
    "rois_all": rois_all,
    "hemis": hemis,
}


def build_readout(name: str, rois: RoiMasks, n_vertices: Mapping[str, int]) -> Readout:
    """The readout called ``name``. Raises UnknownName with the nearest ones."""
    if name not in READOUTS:
        raise UnknownName.of("readout", name, READOUTS)
    return READOUTS[name](rois, n_vertices)


class MaskedReadout(nn.Module):
    """``y_v = sum over the queries q of vertex v of (w_v . token_q + b_v)``.

    A dense layer would compute every query for every vertex (25 times the work for rois_all) and
    mask it away. Here vertices of the same set of queries lie together: the tokens of a set are
    summed once, and each weight row meets one vector.

    weight : (V, dim) in grouped order (``restore`` undoes it); bias : (V,) in vertex order
    """

    order: Tensor
    restore: Tensor
    sets: Tensor
    n_fed: Tensor

    def __init__(self, mask: Masks, dim: int) -> None:
        """mask : (n_queries, V) bool."""
        super().__init__()
        sets, member = np.unique(mask.T, axis=0, return_inverse=True)  # (n_sets, n_queries), (V,)
        member = member.reshape(-1)
        order = np.argsort(member, kind="stable")
        self.sizes = np.bincount(member).tolist()
        self.register_buffer("order", torch.from_numpy(order), persistent=False)
        self.register_buffer("restore", torch.from_numpy(np.argsort(order)), persistent=False)
        self.register_buffer("sets", torch.from_numpy(sets).float(), persistent=False)
        self.register_buffer("n_fed", torch.from_numpy(mask.sum(0)).float(), persistent=False)
        self.weight = nn.Parameter(torch.empty(mask.shape[1], dim))
        self.bias = nn.Parameter(torch.zeros(mask.shape[1]))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens : (B, n_queries, dim) -> (B, V)."""
        summed = torch.einsum("sq,bqd->sbd", self.sets, tokens)
        weights = self.weight.split(self.sizes)  # one backward node, not one padded slice a set
        parts = [F.linear(token, w) for token, w in zip(summed, weights, strict=True)]
        return torch.cat(parts, 1).index_select(1, self.restore) + self.n_fed * self.bias
