"""
What the paper's own code (https://github.com/Bostoncake/UniAttn) has computed, in an adapter.

Its initialisation writes `init_weights_sequential_index_1.npy`, `…_2.npy` and so on, one follower each, bottom to top,
of shape (1, d, d), and all of them stacked, (followers, d, d), as `init_weights_sequential_new_plan.npy`. A matrix W
acts as x · W on the normalised input of attention and is added to its output, as W_c does here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from .config import UniAttnConfig
from .inspection import find_adapter

_STACKED = "init_weights_sequential_new_plan.npy"
_ONE = "init_weights_sequential_index_{}.npy"


def official_config(
    grouping_idx: int, grouping_begin_idx: int, grouping_end_idx: int, num_layers: int, **settings
) -> UniAttnConfig:
    """
    The configuration that the arguments of the official scripts mean, such as `4 16 33` for a model of 32 layers.

    Args:
        grouping_idx: layers per Superblock.
        grouping_begin_idx: the lowest leader.
        grouping_end_idx: where Superblocks stop, exclusive; beyond the model's last layer means there.
        num_layers: decoder layers of the model.
        settings: further arguments of [`UniAttnConfig`].
    """
    return UniAttnConfig(
        superblock_size=grouping_idx,
        start_layer=grouping_begin_idx,
        end_layer=min(grouping_end_idx, num_layers),
        **settings,
    )


def load_official_weights(model: nn.Module, path: str | Path, adapter_name: str | None = None) -> list[int]:
    """
    Put the official code's initial weights into an adapter, in place of `calibrate`.

    Args:
        model: a model with a UniAttn adapter of full rank, whose plan is the one that the weights were computed for.
        path: the stacked file, or the folder that the official code calls `save_dir`.
        adapter_name: default the active adapter.

    Returns:
        the followers, bottom to top.

    Raises:
        ValueError: if there is no such file, or it does not fit the adapter; nothing has been changed then.
    """
    adapter = find_adapter(model, adapter_name)
    if adapter.rank is not None or adapter.compensation != "attention_output":
        raise ValueError(
            f"the adapter {adapter.name!r} has r={adapter.rank} and compensation={adapter.compensation!r}, but the "
            "official code's weights are full matrices on the output of attention; use UniAttnConfig(r=None)"
        )
    followers = sorted(adapter.plan.followers)
    weights = _read(Path(path), len(followers))
    size = adapter.layers[followers[0]].hidden_size
    if weights.shape != (len(followers), size, size):
        raise ValueError(
            f"path={str(path)!r} holds weights of shape {weights.shape}, but {len(followers)} followers of hidden "
            f"size {size} need ({len(followers)}, {size}, {size}); use the base model and the plan that they are for"
        )
    if not np.isfinite(weights).all():
        raise ValueError(f"path={str(path)!r} holds NaN or infinite values; compute the weights again")
    for layer, weight in zip(followers, weights, strict=True):
        adapter.layers[layer].set_compensation(adapter.name, torch.from_numpy(weight))
    return followers


def _read(path: Path, count: int) -> np.ndarray:
    if path.is_dir():
        stacked = path / _STACKED
        if stacked.is_file():
            return _load(stacked)
        return np.concatenate([_load(path / _ONE.format(index)) for index in range(1, count + 1)])
    return _load(path)


def _load(file: Path) -> np.ndarray:
    if not file.is_file():
        raise ValueError(
            f"path={str(file)!r} does not exist; give {_STACKED}, or the folder with it or with {_ONE.format('N')}"
        )
    try:
        array = np.load(file, allow_pickle=False)  # a pickle could run code
    except (ValueError, EOFError) as error:
        raise ValueError(f"path={str(file)!r} is no array that NumPy can read: {error}; compute it again") from error
    if array.dtype.kind != "f":
        raise ValueError(f"path={str(file)!r} holds {array.dtype}, not floating-point numbers; compute it again")
    return array
