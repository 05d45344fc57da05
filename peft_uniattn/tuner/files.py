"""An adapter's weight file against its configuration, before a model is changed."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

from ..plan import shortened
from .config import AttentionConfig

PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"
# As safetensors spells them. Other types would be cast silently, whatever their values mean.
FLOATING = ("F64", "F32", "F16", "BF16")

Shapes = dict[str, tuple[int, ...]]


def check_weight_file(folder: Path, expected: Shapes, optional: Shapes) -> None:
    """
    Raise an error unless the weight file in `folder` holds what the adapter is made of, and nothing else.

    PEFT reads the file after it has changed the model, lets what is missing stay as it was initialised, and overwrites
    weights of the base if the file names them.

    Args:
        folder: where adapter_config.json is.
        expected: shapes of the adapter's tensors by name in the base model, without the adapter's name.
        optional: the same of tensors that may be in the file.

    Raises:
        SafetensorError: if the file is damaged.
        ValueError: if it is no weight file, or if a tensor is missing, is not the adapter's, or has another shape or
            type.
    """
    file = _weight_file(folder)
    found = _shapes(file)
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(
            f"{file} lacks {missing[0]!r} ({len(missing)} of {len(expected)} tensors are missing), which the "
            f"{CONFIG_NAME} beside it asks for; use the files of one adapter together"
        )
    allowed = {**optional, **expected}
    for name, (shape, dtype) in sorted(found.items()):
        if name not in allowed:
            raise ValueError(
                f"{file} holds {shortened(repr(name))}, which is not part of the adapter that the {CONFIG_NAME} "
                "beside it describes; use the files of one adapter together"
            )
        if shape != allowed[name]:
            raise ValueError(
                f"{file}: size mismatch for {name!r}, which has the shape {shape} instead of {allowed[name]}; use the "
                "files of one adapter together, with the base model they were made for"
            )
        if dtype not in FLOATING:
            raise ValueError(f"{file} holds {name!r} as {dtype}; save it as one of {', '.join(FLOATING)}")


def shapes_of_extra_parts(config: AttentionConfig, model: nn.Module) -> Shapes:
    """Shapes of what an adapter file holds of `modules_to_save` and of trained tokens, by name in the model."""
    ends = tuple(config.modules_to_save or ())
    # As PEFT picks them: modules whose names end like this, each saved under its own name.
    shapes = {
        f"{name}.{key}": tuple(tensor.shape)
        for name, module in model.named_modules()
        if name.endswith(ends) and ".modules_to_save." not in name
        for key, tensor in _original(module).state_dict().items()
    }
    embedding = model.get_input_embeddings()
    if embedding is not None and (indices := _tokens(config, name := _name(embedding, model))) is not None:
        vocabulary, width = _original(embedding).weight.shape
        if max(indices, default=0) >= vocabulary:
            raise ValueError(
                f"trainable_token_indices={shortened(repr(config.trainable_token_indices))} names token "
                f"{max(indices)}, but the model has {vocabulary}; leave it out, or resize the embeddings first"
            )
        shapes[f"{name}.{TOKENS}"] = (len(indices), width)
    return shapes


def optional_shapes(config: AttentionConfig, model: nn.Module) -> Shapes:
    """The same of what may be in the file: embeddings, which PEFT saves after their size was changed."""
    shapes = {}
    for embedding in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        name, shape = _name(embedding, model), tuple(_original(embedding).weight.shape)
        shapes[f"{name}.weight"] = shape
        if (indices := _tokens(config, name)) is not None:
            shapes[f"{name}.{TOKENS}"] = (len(indices), *shape[1:])
    return shapes


def _tokens(config: AttentionConfig, embedding: str) -> list[int] | None:
    """The trained tokens of an embedding; a list in the configuration means any, which is the input's for PEFT."""
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        return next((items for end, items in indices.items() if embedding.endswith(end)), None)
    return indices


def _name(module: nn.Module, model: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _original(module: nn.Module) -> nn.Module:
    """What a module is that PEFT may have wrapped to train it."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def _weight_file(folder: Path) -> Path:
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} holds an {CONFIG_NAME}, but no {SAFETENSORS_WEIGHTS_NAME}; copy it there")


def _shapes(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and data type of every tensor in `file` by name in the base model."""
    read = _shapes_of_safetensors if file.name == SAFETENSORS_WEIGHTS_NAME else _shapes_of_pickle
    return {name.removeprefix(PREFIX): entry for name, entry in read(file).items()}


def _shapes_of_safetensors(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise SafetensorError(f"{file} is damaged ({error}); copy or download it again") from error


def _shapes_of_pickle(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    spelling = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: (tuple(t.shape), spelling.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{file} is no file of weights ({shortened(str(error))}); copy or download it again"
        ) from error
