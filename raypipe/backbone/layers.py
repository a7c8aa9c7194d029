"""Which layers: a block counted from either end, or module paths that a person names.

Paths are proven against the model itself, built without memory for its weights, so that a slip is
met with the nearest names before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from raypipe.backbone.spec import BackboneSpec, LayerSpec, Part, layer_folder
from raypipe.errors import ConfigError, UnknownName


def chosen_layers(spec: BackboneSpec, layers: Sequence[str]) -> tuple[LayerSpec, ...]:
    """Specs of the module paths a person named, each proven to exist."""
    known = _module_names(spec)
    chosen = []
    for text in layers:
        module, _, part = text.removeprefix(
            "visual." if spec.library == "open_clip" else ""
        ).partition(":")
        if module not in known:
            raise UnknownName.of("layer", module, known, f"module paths of {spec.name}")
        if part not in ("", "out", "q", "k", "v"):
            raise UnknownName.of("part", part, ("out", "q", "k", "v"), f"in layer {text!r}")
        key = f"{module}-{part}" if part not in ("", "out") else module
        kind: Part = part or "out"  # type: ignore[assignment]
        chosen.append(
            LayerSpec(key=key, module=module, part=kind, folder=layer_folder(spec.name, key))
        )
    return tuple(chosen)


def block_of(spec: BackboneSpec, enc_layer: int) -> LayerSpec:
    """Block ``enc_layer`` of a library's model, where it has a plain list of blocks."""
    known = set(_module_names(spec))
    for stem in ("blocks", "transformer.resblocks", "trunk.blocks"):
        depth = sum(name.rpartition(".")[0] == stem and name[-1].isdigit() for name in known)
        if depth:
            block, key = block_index(enc_layer, depth)
            return LayerSpec(key=key, module=f"{stem}.{block}", folder=layer_folder(spec.name, key))
    raise ConfigError(
        f"{spec.name} has no list of blocks for enc-layer {enc_layer} to count; use --layer"
    )


def _module_names(spec: BackboneSpec) -> list[str]:
    """All module paths of the model, built without memory for its weights."""
    from raypipe.backbone.libraries import build_on_meta

    return [name for name, _ in build_on_meta(spec).named_modules() if name]


def block_index(enc_layer: int, depth: int) -> tuple[int, str]:
    """(index from 0, key) of block ``enc_layer`` of ``depth``; the last one's key is "last"."""
    if not -depth <= enc_layer < depth:
        raise ConfigError(
            f"enc-layer {enc_layer} is not in {-depth}..{depth - 1}; the model has {depth} blocks"
        )
    index = enc_layer % depth
    return index, "last" if index == depth - 1 else str(index)
