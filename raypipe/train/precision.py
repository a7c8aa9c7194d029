"""The techniques of training, applied in one visible sequence, and the table that says which.

`prepare` is the sequence: device, SyncBN, channels_last, compilation, activation checkpointing,
autocast, loss scaling, DDP, a line each. The steps that use them are in ``engine``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raypipe.errors import ConfigError, DeviceUnavailable
from raypipe.train.config import TrainConfig
from raypipe.train.context import WorkerContext
from raypipe.train.recompute import recompute
from raypipe.units import format_seconds

_AUTOCAST = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Prepared:
    """A model made ready: ``model`` to call in training, ``module`` the bare one beneath it."""

    model: nn.Module
    module: nn.Module
    autocast: Callable[[], AbstractContextManager[Any]]
    scaler: torch.amp.GradScaler
    channels_last: bool
    checkpointed_blocks: int
    synced_norms: int = 0
    unreached: tuple[str, ...] = ()

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        """Around one micro batch: gradients are exchanged on the step's last one only."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def place(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``batch`` with its 4-D tensors (b, c, h, w) in the model's memory format."""
        if not self.channels_last:
            return batch
        layout = torch.channels_last
        return {
            k: v.contiguous(memory_format=layout) if v.ndim == 4 else v for k, v in batch.items()
        }


def prepare(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    cfg: TrainConfig,
    ctx: WorkerContext,
    unreached: Callable[[Prepared], tuple[str, ...]] = lambda prepared: (),
) -> Prepared:
    """Apply ``cfg``'s techniques to ``module``, whose recomputable parts are ``blocks``.

    ``unreached``: looks for the parameters that the loss never reaches; asked before DDP alone.
    Raises ConfigError for what this model cannot do.
    """
    device = ctx.torch_device
    module = module.to(device)
    synced = _apply_sync_batch_norm(module, device) if cfg.sync_batch_norm and ctx.world > 1 else 0
    channels_last = _apply_channels_last(module) if cfg.channels_last else False
    _apply_compile(module, blocks if cfg.checkpointing else (), cfg)
    checkpointed = _apply_checkpointing(blocks, cfg.use_reentrant) if cfg.checkpointing else 0
    autocast = _autocast(device, cfg)
    scaler = torch.amp.GradScaler(device.type, init_scale=cfg.init_scale, enabled=cfg.amp == "fp16")
    alone = Prepared(module, module, autocast, scaler, channels_last, checkpointed, synced)
    if ctx.world == 1:
        return alone
    names = unreached(alone)
    _check_recomputable(names, cfg)
    return replace(alone, model=_wrap_ddp(module, device, names), unreached=names)


def settings_table(
    cfg: TrainConfig,
    *,
    world: int,
    device: str,
    n_train: int,
    n_val: int,
    rows_per_step: int,
    prepared: Prepared | None = None,
) -> list[tuple[str, str]]:
    """(name, value) rows that say how training runs; ``prepared`` adds what came of it."""
    schedules = {
        "step": f"x{cfg.gamma:g} every {cfg.step_size} epochs",
        "cosine": "cosine to 0",
        "constant": "constant",
    }
    clip = "off" if cfg.clip_norm is None else f"norm {cfg.clip_norm:g}"
    scale = f", first scale {cfg.init_scale:g}" if cfg.amp == "fp16" else ""
    steps = -(-n_train // rows_per_step)
    return [
        ("workers", f"{world} on {device}" + (", DDP" if world > 1 else "")),
        ("rows", f"{n_train} to train, {n_val} to validate"),
        ("step", f"{rows_per_step} rows, in micro batches of {cfg.batch_size} a worker"),
        ("length", f"{cfg.epochs} epochs of {steps} steps{_patience_words(cfg)}"),
        ("optimiser", f"AdamW, lr {cfg.lr:g}, weight decay {cfg.weight_decay:g}"),
        ("schedule", schedules[cfg.schedule] + f", {cfg.warmup_steps} steps of warm-up"),
        ("gradient clip", clip),
        ("AMP", cfg.amp + scale),
        ("checkpointing", _checkpointing_words(cfg, prepared)),
        ("channels_last", _channels_last_words(cfg, prepared)),
        *_optional_rows(cfg, world, prepared),
        ("seed", str(cfg.seed)),
        ("checkpoints", _checkpoints_words(cfg)),
        *([("parameters", f"{_trainable(prepared.module):,}")] if prepared else []),
    ]


def format_table(rows: Sequence[tuple[str, str]]) -> str:
    """``rows`` as aligned lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def use_device(device: torch.device, cfg: TrainConfig) -> None:
    """Make a CUDA ``device`` the current one. Raises DeviceUnavailable, ConfigError (no bf16)."""
    if device.type != "cuda":
        return
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(
            f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    torch.cuda.set_device(device.index or 0)
    if cfg.amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("train amp='bf16': this GPU has no bfloat16 units; use fp16 or off")


def has_convolutions(module: nn.Module) -> bool:
    """Whether channels_last means anything to ``module``."""
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def _apply_channels_last(module: nn.Module) -> bool:
    """NHWC weights where 2-D convolutions exist; says whether there were any."""
    if not has_convolutions(module):
        return False
    module.to(memory_format=torch.channels_last)
    return True


def _apply_sync_batch_norm(module: nn.Module, device: torch.device) -> int:
    """Batch norms whose statistics are of all workers' rows; how many there are."""
    if device.type != "cuda":
        raise ConfigError(
            f"train sync_batch_norm=True on {device}: torch synchronises batch norm on CUDA only;"
            " leave it out"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return sum(isinstance(part, nn.SyncBatchNorm) for part in module.modules())


def _apply_compile(module: nn.Module, blocks: Sequence[nn.Module], cfg: TrainConfig) -> None:
    """torch.compile of each block that will be recomputed, or of the whole module.

    Blocks one by one, inside their checkpoint: compiled around it, the recomputation would be part
    of the graph, and the buffers that it must not write to as well.
    """
    if not cfg.compile:
        return
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=cfg.compile_backend)
    if not blocks:
        module.compile(backend=cfg.compile_backend)


def _apply_checkpointing(blocks: Sequence[nn.Module], use_reentrant: bool) -> int:
    """Make each block recompute itself in the backward pass; the number of blocks."""
    if not blocks:
        raise ConfigError("train checkpointing=True: this model names no blocks to recompute")
    recompute(blocks, use_reentrant)
    return len(blocks)


def _autocast(device: torch.device, cfg: TrainConfig) -> Callable[[], AbstractContextManager[Any]]:
    if cfg.amp == "off":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=_AUTOCAST[cfg.amp])


def _check_recomputable(unreached: Sequence[str], cfg: TrainConfig) -> None:
    """DDP takes what a reentrant block holds for unused too: its graph is made in the backward pass."""
    if unreached and cfg.checkpointing and cfg.use_reentrant:
        raise ConfigError(
            f"train use_reentrant=True on several workers: the loss never reaches"
            f" {_some(unreached)}, which DDP and reentrant checkpointing cannot both do without;"
            " leave use_reentrant out"
        )


def _wrap_ddp(
    module: nn.Module, device: torch.device, unreached: Sequence[str] = ()
) -> DistributedDataParallel:
    ids = [device.index or 0] if device.type == "cuda" else None
    # A view saves one copy of the gradients. Looking for unused parameters in each step's graph costs
    # time, so it is done where there are any. Not frozen instead: a branch may be taken later.
    return DistributedDataParallel(
        module,
        device_ids=ids,
        gradient_as_bucket_view=True,
        find_unused_parameters=bool(unreached),
    )


def _some(names: Sequence[str]) -> str:
    """How many, and the first two."""
    more = ", ..." if len(names) > 2 else ""
    return f"{len(names)} parameters ({', '.join(names[:2])}{more})"


def _checkpointing_words(cfg: TrainConfig, prepared: Prepared | None) -> str:
    if not cfg.checkpointing:
        return "off"
    blocks = f"{prepared.checkpointed_blocks} blocks" if prepared else "on"
    return f"{blocks}, {'reentrant' if cfg.use_reentrant else 'non-reentrant'}"


def _optional_rows(
    cfg: TrainConfig, world: int, prepared: Prepared | None
) -> list[tuple[str, str]]:
    """Of techniques that take no less memory: a row where one is asked for."""
    norms = f"{prepared.synced_norms} norms" if prepared else "on"
    rows = {
        "SyncBN": (norms if world > 1 else "off: one worker") if cfg.sync_batch_norm else "",
        "torch.compile": cfg.compile_backend if cfg.compile else "",
        "weight average": f"decay {cfg.ema_decay:g}" if cfg.ema_decay is not None else "",
        "no gradient": _unreached_words(prepared),
    }
    return [(name, value) for name, value in rows.items() if value]


def _unreached_words(prepared: Prepared | None) -> str:
    if prepared is None or not prepared.unreached:
        return ""
    return f"{_some(prepared.unreached)} the loss did not reach; DDP looks for such at each step"


def _checkpoints_words(cfg: TrainConfig) -> str:
    words = ["each epoch"]
    if cfg.checkpoint_every_steps:
        words.append(f"every {cfg.checkpoint_every_steps} steps")
    if cfg.checkpoint_every_s:
        words.append(f"a minute in, {format_seconds(cfg.checkpoint_every_s)} after the last")
    return f"{', '.join(words)}; {cfg.keep} kept"


def _patience_words(cfg: TrainConfig) -> str:
    return f", fewer after {cfg.patience} without a better one" if cfg.patience else ""


def _channels_last_words(cfg: TrainConfig, prepared: Prepared | None) -> str:
    if not cfg.channels_last:
        return "off"
    return "on" if prepared is None or prepared.channels_last else "off: no 2-D convolutions"


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
