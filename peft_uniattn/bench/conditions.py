"""What the numbers of a benchmark hold for: hardware and versions."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from ..kernels import describe


def conditions(device: torch.device) -> dict[str, Any]:
    """Hardware, and versions of what computes on it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        hardware |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        hardware = {"device": f"CPU ({platform.machine()})", "threads": torch.get_num_threads()}
    versions = {name: version(name) for name in ("transformers", "peft")}
    versions["kernels"] = describe()
    return {**hardware, "python": platform.python_version(), "torch": torch.__version__, **versions}
