"""Models without weights: everything about their shape, nothing to download, next to no memory."""

from __future__ import annotations

import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..bench.shapes import SHAPES, shape_config
from ..families import find_family
from ..plan import Plan
from ..standalone_modeling import standalone_class_of


def read_config(model: str) -> PretrainedConfig:
    """
    The (text) configuration of a model that can share its softmax.

    Args:
        model: a folder with a `config.json`, a name on the Hub, or one of `bench.shapes.SHAPES`.

    Raises:
        ValueError: if there is no such model, or its architecture is not supported.
    """
    if model in SHAPES and not os.path.isdir(model):
        return shape_config(model)
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={model!r} has no configuration that can be read ({str(error).splitlines()[0]}); give a folder "
            f"with a config.json (no weights are read), a name that the Hub knows, or one of {', '.join(SHAPES)}"
        ) from error
    config = config.get_text_config(decoder=True)
    find_family(config)
    return config


def base_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of `config` on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def unified_on_meta(
    config: PretrainedConfig, plan: Plan, *, follower_mask: str, rank: int | None, dtype: torch.dtype
) -> PreTrainedModel:
    """The standalone model that `plan` makes of the model of `config`, on the meta device."""
    fields = config.to_dict()
    del fields["model_type"]
    fields.update(
        superblocks=[list(block) for block in plan.superblocks],
        follower_mask=follower_mask,
        compensation_rank=rank,
        dtype=dtype,
    )
    fields.pop("quantization_config", None)
    unified_class = standalone_class_of(config.model_type)
    with torch.device("meta"):
        model = unified_class(unified_class.config_class.from_dict(fields))
    return model.to(dtype)
