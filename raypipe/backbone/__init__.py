"""Pixels -> tokens: which model, which layer, which preprocessing, and the forward pass.

``registry.resolve`` turns a name and options into a ``BackboneSpec``, which declares everything;
``model.load`` makes the running ``Backbone`` of it. This package's own import loads no torch, so
that help and planning stay quick: import ``raypipe.backbone.model`` where tokens are computed.
"""

from __future__ import annotations

from raypipe.backbone.preprocess import Preprocess
from raypipe.backbone.registry import names, resolve
from raypipe.backbone.spec import BackboneSpec, LayerSpec, TokenLayout

__all__ = ["BackboneSpec", "LayerSpec", "Preprocess", "TokenLayout", "names", "resolve"]
