"""Ways to damage saved files, at random but by seed: bytes, tensors and JSON fields."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

JUNK = [
    None,
    True,
    -1,
    0,
    0.5,
    2**63,
    10**30,
    -(10**6),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "../../etc/passwd",
    "\0",
    "x" * 100_000,
    [],
    [None],
    [[0]],
    [[0, 10**9]],
    [["0", "1"]],
    [list(range(10**6))],
    [[i, i + 1] for i in range(0, 10**5, 2)],
    {},
    {"a": {"b": []}},
    {"model_type": "llama"},
    [{}],
]
HOSTILE_NAMES = [
    "../../../tmp/evil",
    "/etc/passwd",
    "",
    "__metadata__x",
    "a" * 10_000,
    "\u202egnp.exe",
    "base_model.model.model.layers.999999.self_attn.uniattn_W.weight",
    "base_model.model.model.layers.0.self_attn.uniattn_W.weight",
    "base_model.model.model.layers.1.self_attn.uniattn_W.default.weight",
    "base_model.model.model.layers.1.self_attn.base_layer.v_proj.weight",
    "base_model.model.model.norm.weight",
    "base_model.model.__class__",
]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 64))


def flip_bits(data: bytes, rng: random.Random, start: int = 0, end: int | None = None) -> bytes:
    """1 to 8 bits between two offsets."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(start, end or len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_bits_of_header(data: bytes, rng: random.Random) -> bytes:
    return flip_bits(data, rng, 0, header_size(data))


def flip_bits_of_values(data: bytes, rng: random.Random) -> bytes:
    return flip_bits(data, rng, header_size(data))


def erase(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data))
    last = min(len(data), first + rng.randint(1, 200))
    return data[:first] + bytes(last - first) + data[last:]


def claim_another_header_size(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data), header_size(data) - 9])
    return struct.pack("<Q", size) + data[8:]


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """One field of one tensor: offsets outside the file or on top of others', shapes and types that do not fit."""
    size = header_size(data)
    header = json.loads(data[8:size])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    entry[field] = rng.choice(
        {
            "dtype": ["I8", "I64", "BOOL", "F16", "BF16", "C64", "F4", "", None, 3],
            "shape": [[], [0], [-1], [2**40, 2**40], [1, *entry["shape"]], entry["shape"][::-1], "2", None],
            "data_offsets": [[0, 0], [0, 8], [8, 0], [0, 2**62], [-8, 0], [], None],
        }[field]
    )
    return with_header(json.dumps(header).encode(), data[size:])


def nest_header(data: bytes, rng: random.Random) -> bytes:
    depth = rng.choice([100, 10_000])
    return with_header(b'{"a":' * depth + b"1" + b"}" * depth, data[header_size(data) :])


def be_something_else(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\0" * 8, b"{}", b"PK\3\4" + data, b"\x80\2c__builtin__\neval\n", b"\x89PNG", b"\n" * 9])


BYTES: list[Callable[[bytes, random.Random], bytes]] = [
    truncate,
    append,
    flip_bits,
    flip_bits_of_header,
    flip_bits_of_values,
    erase,
    claim_another_header_size,
    edit_header,
    nest_header,
    be_something_else,
]


def header_size(data: bytes) -> int:
    """Where the values of a safetensors file begin."""
    return 8 + struct.unpack("<Q", data[:8])[0]


def with_header(header: bytes, values: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + values


Tensors = dict[str, torch.Tensor]


def cast(tensors: Tensors, rng: random.Random) -> None:
    types = [torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.complex64]
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].to(rng.choice(types))


def reshape(tensors: Tensors, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    ways = [lambda t: t[None], lambda t: t.flatten(), lambda t: t[:-1], lambda t: t[:0], lambda t: t.flatten()[0]]
    tensors[name] = rng.choice(ways)(tensors[name]).clone()


def drop(tensors: Tensors, rng: random.Random) -> None:
    for name in rng.sample(sorted(tensors), rng.randint(1, len(tensors))):
        del tensors[name]


def add(tensors: Tensors, rng: random.Random) -> None:
    tensors[rng.choice(HOSTILE_NAMES)] = tensors[rng.choice(sorted(tensors))].clone()


def rename(tensors: Tensors, rng: random.Random) -> None:
    tensors[rng.choice(HOSTILE_NAMES)] = tensors.pop(rng.choice(sorted(tensors)))


TENSORS: list[Callable[[Tensors, random.Random], None]] = [cast, reshape, drop, add, rename]


def mutate_weights(file: Path, rng: random.Random) -> str:
    """Damage a safetensors file in one way; returns which."""
    if rng.random() < 0.6:
        mutation = rng.choice(BYTES)
        file.write_bytes(mutation(file.read_bytes(), rng))
    else:
        mutation = rng.choice(TENSORS)
        tensors = load_file(file)
        mutation(tensors, rng)
        save_file(tensors, file, metadata={"format": "pt"})
    return mutation.__name__


def mutate_json(file: Path, rng: random.Random, keep: tuple[str, ...] = ()) -> str:
    """Damage a JSON file in one way, but none of the fields `keep`; returns which."""
    content = json.loads(file.read_text())
    names = sorted(content.keys() - set(keep))
    way = rng.choice(["junk", "junk", "junk", "unknown", "drop", "newer", "bytes", "instead"])
    if way == "bytes":
        mutation = rng.choice([truncate, flip_bits, erase, append, be_something_else])
        file.write_bytes(mutation(file.read_bytes(), rng))
        return mutation.__name__
    if way == "instead":
        file.write_text(json.dumps(rng.choice([value for value in JUNK if not isinstance(value, dict)])))
        return way
    name = rng.choice(names)
    if way == "junk":
        content[name] = copy.deepcopy(rng.choice(JUNK))
    elif way == "unknown":
        content[rng.choice(["../x", "__class__", "self", "kernel_v9", "x" * 5000])] = rng.choice(JUNK)
    elif way == "drop":
        del content[name]
    else:
        content |= {"peft_version": "99.0.0", "uniattn_version": "99.0.0", "transformers_version": "99.0.0"}
    file.write_text(json.dumps(content))
    return f"{way} {name}"


def fields(file: Path) -> dict[str, Any] | None:
    """The JSON object in `file`, or None if there is none."""
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
