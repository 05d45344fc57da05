"""An adapter's weight file against its configuration, before a model is changed."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..plan import shortened

PREFIX = "base_model.model."
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
