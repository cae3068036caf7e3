"""What a vision model takes, as its config.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmm_lab.errors import InputError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels of a model -> Pillow's name
_HOW = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")  # in a config


@dataclass(frozen=True)
class InputFormat:
    """What a model takes, as timm's ``pretrained_cfg`` says: shape (C, H, W), mean and std."""

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0  # share of the resized image that the centre crop keeps
    crop_mode: str = "center"  # timm's name of the crop

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> InputFormat:
        """From a timm config.json; ``model_args`` win over ``pretrained_cfg`` where both speak.

        Without mean and std, all that is missing is timm's own for the architecture.
        Raises InputError for other channels than 1 (grey), 3 (RGB) and 4 (RGBA).
        """
        cfg, args = preprocessing(config), config.get("model_args") or {}
        c, h, w = cfg.get("input_size") or (3, 224, 224)
        size = args.get("img_size", (h, w))
        h, w = (size, size) if isinstance(size, int) else size
        c = args.get("in_chans", c)
        if c not in MODES:
            raise InputError(
                f"model: expected 1 channel (grey), 3 (RGB) or 4 (RGBA), found {c}; pictures have no others"
            )
        mean, std = (_channels(cfg.get(key) or (0.5,), c) for key in ("mean", "std"))
        return cls(
            (c, h, w),
            mean,
            std,
            cfg.get("interpolation") or "bicubic",
            cfg.get("crop_pct") or 1.0,
            cfg.get("crop_mode") or "center",
        )

    def normalise(self, images: Tensor) -> Tensor:
        """(n, C, H, W) uint8 -> float32, (x / 255 - mean) / std per channel."""
        mean = torch.tensor(self.mean).view(-1, 1, 1)  # (C, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)  # (C, 1, 1)
        return (images.float() / 255 - mean) / std


def preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """``pretrained_cfg`` of a timm config.json, completed by timm's for the architecture if it has no mean.

    Old config.json files have its keys at their top.
    """
    cfg = {k: config[k] for k in _HOW if k in config} | dict(config.get("pretrained_cfg") or {})
    if cfg.get("mean") or cfg.get("std") or "architecture" not in config:
        return cfg
    from timm.models import get_pretrained_cfg

    try:
        own = get_pretrained_cfg(config["architecture"])
    except RuntimeError:  # the model cannot be built either, and ``create`` says so
        own = None
    known = own.to_dict() if own else {}
    return {k: known[k] for k in (*_HOW, "fixed_input_size") if k in known} | cfg


def _channels(values: Sequence[float], c: int) -> tuple[float, ...]:
    """A mean or deviation for c channels: of RGB for a grey model, the mean of the three, as timm does."""
    usual = sum(values) / len(values)
    if c == 4 and len(values) == 3:
        return (*values, usual)
    return tuple(values) if len(values) == c else (usual,) * c
