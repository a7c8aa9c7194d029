"""Encoders: backbone tokens of an image -> the responses of both hemispheres.

``transformer`` is the brain encoder of Adeli, Minni and Kriegeskorte: learned ROI queries read the
patch tokens through cross-attention. ``linear`` reads pooled tokens. Another encoder is one more
entry in ENCODERS; which query feeds which vertex is in ``readout``.

Tokens come as stored: prefix tokens (CLS, registers) first, then patches row-major. The transformer
leaves the prefix out, since it has no place on the grid; ``linear`` uses CLS only where asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raypipe.encoding.config import ModelConfig
from raypipe.encoding.positions import sine_positions
from raypipe.encoding.readout import HEMIS, MaskedReadout, Readout
from raypipe.encoding.shapes import TokenShape
from raypipe.errors import InputError, UnknownName


class TokenScaler(nn.Module):
    """Centres and scales each channel with fixed numbers of the training rows.

    Sine positions have unit scale, tokens of different backbones anything from 0.01 to 50: without
    this the attention sees only the larger of the two. Identity until ``set`` is called.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """mean, std : (dim,). A channel that hardly varies is centred, not blown up."""
        self.mean.copy_(mean)
        self.scale.copy_(1 / std.clamp(min=1e-3 * float(std.max()) + 1e-12))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., dim) of any floating dtype -> float32."""
        return (tokens.float() - self.mean) * self.scale


class CrossAttentionBlock(nn.Module):
    """One pre-norm decoder layer without self-attention: queries read patches, then an FFN."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(cfg.d_model)
        self.attention = nn.MultiheadAttention(
            cfg.d_model, cfg.heads, dropout=cfg.dropout, batch_first=True
        )
        self.norm_ffn = nn.LayerNorm(cfg.d_model)
        self.expand = nn.Linear(cfg.d_model, cfg.ffn)
        self.contract = nn.Linear(cfg.ffn, cfg.d_model)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, target: Tensor, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """target (B, Q, D), query (Q, D), memory (B, T, D), position (T, D) -> (B, Q, D).

        Positions go to queries and keys, never to values (DETR).
        """
        asked = self.norm_attention(target) + query
        read, _ = self.attention(asked, memory + position, memory, need_weights=False)
        target = target + self.dropout(read)
        hidden = self.dropout(F.relu(self.expand(self.norm_ffn(target))))
        return target + self.dropout(self.contract(hidden))


class TransformerEncoder(nn.Module):
    """Learned queries, ``layers`` cross-attention blocks, a final norm, a masked linear readout."""

    position: Tensor

    def __init__(self, cfg: ModelConfig, tokens: TokenShape, readout: Readout) -> None:
        super().__init__()
        self.prefix = tokens.prefix
        self.scaler = TokenScaler(tokens.dim)
        same = tokens.dim == cfg.d_model
        self.project = nn.Identity() if same else nn.Linear(tokens.dim, cfg.d_model)
        position = sine_positions(tokens.height, tokens.width, cfg.d_model)
        self.register_buffer("position", position, persistent=False)
        self.query = nn.Parameter(torch.randn(len(readout.queries), cfg.d_model))
        self.blocks = nn.ModuleList(CrossAttentionBlock(cfg) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.d_model)
        self.readouts = nn.ModuleDict(
            {hemi: MaskedReadout(readout.masks[hemi], cfg.d_model) for hemi in HEMIS}
        )
        self.n_queries = [len(readout.masks[hemi]) for hemi in HEMIS]
        for parameter in self.blocks.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens : (B, n_tokens, dim) -> hemisphere -> (B, V)."""
        memory = self.project(self.scaler(tokens[:, self.prefix :]))
        target = memory.new_zeros(len(memory), *self.query.shape)
        for block in self.blocks:
            target = block(target, self.query, memory, self.position)
        parts = self.norm(target).split(self.n_queries, dim=1)
        return {hemi: self.readouts[hemi](part) for hemi, part in zip(HEMIS, parts, strict=True)}


class LinearEncoder(nn.Module):
    """Pooled tokens -> one linear layer a hemisphere. Pools: ``mean``, ``cls``, ``grid``.

    ``grid`` averages the patches to ``linear_grid`` x ``linear_grid`` cells and keeps their places.
    """

    def __init__(self, cfg: ModelConfig, tokens: TokenShape, readout: Readout) -> None:
        super().__init__()
        if cfg.linear_pool == "cls" and tokens.prefix == 0:
            raise InputError(
                "--linear-pool cls: these features hold no CLS token; use mean or grid, or extract"
                " a backbone that has one"
            )
        self.pool, self.shape = cfg.linear_pool, tokens
        self.grid = cfg.linear_grid if cfg.linear_pool == "grid" else 1
        self.scaler = TokenScaler(tokens.dim)
        self.dropout = nn.Dropout(cfg.dropout)
        dim = tokens.dim * self.grid**2
        self.readouts = nn.ModuleDict(
            {hemi: nn.Linear(dim, readout.n_vertices(hemi)) for hemi in HEMIS}
        )

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens : (B, n_tokens, dim) -> hemisphere -> (B, V)."""
        pooled = self.dropout(self.pooled(tokens))
        return {hemi: self.readouts[hemi](pooled) for hemi in HEMIS}

    def pooled(self, tokens: Tensor) -> Tensor:
        """(B, n_tokens, dim) -> (B, dim * grid^2), float32."""
        if self.pool == "cls":
            return self.scaler(tokens[:, 0])
        patches = self.scaler(tokens[:, self.shape.prefix :])
        if self.pool == "mean":
            return patches.mean(1)
        maps = patches.transpose(1, 2).unflatten(2, (self.shape.height, self.shape.width))
        return F.adaptive_avg_pool2d(maps, self.grid).flatten(1)


ENCODERS: Mapping[str, Callable[[ModelConfig, TokenShape, Readout], nn.Module]] = {
    "transformer": TransformerEncoder,
    "linear": LinearEncoder,
}


def build_encoder(cfg: ModelConfig, tokens: TokenShape, readout: Readout) -> nn.Module:
    """The encoder that ``cfg.model`` names. Raises UnknownName with the nearest ones."""
    if cfg.model not in ENCODERS:
        raise UnknownName.of("model", cfg.model, ENCODERS)
    return ENCODERS[cfg.model](cfg, tokens, readout)
