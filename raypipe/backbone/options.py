"""Which features of an image: the options that extraction and on-the-fly training share.

One dataclass, so that the same flags mean the same numbers whether the features are stored first or
computed each time. Frozen and checked when made; imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raypipe.backbone.registry import resolve
from raypipe.backbone.spec import BackboneSpec
from raypipe.errors import ConfigError

StoreDtype = Literal["float16", "float32", "bfloat16"]
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Backbone, layer, weights and how images are read."""

    backbone: str = "dinov2_q"
    """dinov2_q, dinov2_k, dinov2_v, dinov2, clip, resnet18, resnet50, timm:NAME or open_clip:NAME."""
    enc_layer: int = -1
    """Transformer block to take, counted from 0; negative counts from the end."""
    layer: tuple[str, ...] = ()
    """Module paths for timm: and open_clip: models; several share one forward pass, a store each."""
    weights: str = "pretrained"
    """pretrained (from the hub), random:SEED, or a local .safetensors, .pth or .pt file."""
    preprocess: Literal["default", "imagenet", "clip"] = "default"
    """Mean and std: the backbone's own, or another convention."""
    image_size: int | None = None
    """Resize and centre-crop to this square first; by default what the backbone declares."""
    store_dtype: StoreDtype = "float16"
    """Type on disk. float16 halves the store; the largest relative error it made is reported.
    On the fly: what tokens are rounded to, so that the numbers are those of a store."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the backbone's forward pass (autocast for bf16 and fp16)."""
    decode_threads: int | None = None
    """Threads a worker reads images ahead with: by default 2 on a CPU, 8 beside a GPU.
    On the fly with Ray: decode actors a training worker; by default the CPUs left, 8 at most."""
    on_bad_image: Literal["mark", "fail"] = "mark"
    """An image that cannot be read keeps its row, marked invalid; fail stops the run instead."""

    def __post_init__(self) -> None:
        self._check_counts("decode_threads", "image_size")

    def _check_counts(self, *names: str) -> None:
        """Raise ConfigError where one of these is given and below 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} is below 1; give 1 or more")

    def spec(self) -> BackboneSpec:
        """The backbone that these name. Raises as `registry.resolve`, and ConfigError."""
        if self.layer and not self.backbone.startswith(("timm:", "open_clip:")):
            raise ConfigError(
                f"--layer goes with timm:NAME and open_clip:NAME; {self.backbone} takes --enc-layer"
            )
        return resolve(
            self.backbone,
            enc_layer=self.enc_layer,
            layers=self.layer,
            preprocess=self.preprocess,
            image_size=self.image_size,
        )

    def absolute_weights(self) -> str:
        """``weights`` for a process in another working directory."""
        by_name = self.weights == "pretrained" or self.weights.startswith("random:")
        return self.weights if by_name else str(Path(self.weights).expanduser().absolute())


def feature_identity(
    options: FeatureOptions,
    spec: BackboneSpec,
    layer: str,
    weights_sha256: str,
    hw: tuple[int, int],
) -> dict[str, Any]:
    """What decides a layer's numbers, for manifests and run records; hw : pixels of the images."""
    return {
        **spec.identity(layer),
        "weights_sha256": weights_sha256,
        "precision": options.precision,
        # Where weights lie does not matter, their digest does; but a seed is worth reading.
        **({"weights": options.weights} if options.weights.startswith("random:") else {}),
        **({"image_hw": list(hw)} if spec.preprocess.resize is None else {}),
    }
