"""One result file for every analysis: what was measured, on what, with what."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..training.journal import write_atomically

ANALYSES = ("similarity", "plan", "sweep", "depth", "compensation")


@dataclass(frozen=True)
class Record:
    """
    Attributes:
        analysis: one of `ANALYSES`.
        model: honest name of the model.
        data: what it was measured on.
        settings: what the user may choose.
        environment: versions and hardware.
        results: what was found, as JSON types.
    """

    analysis: str
    model: str
    data: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """
        Read what [`save`] wrote.

        Raises:
            ValueError: if the file is no result of an analysis.
        """
        try:
            content = json.loads(path.read_text())
            record = cls(**content)
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"{path} is no result of an analysis; give a file that --output wrote") from error
        if record.analysis not in ANALYSES:
            raise ValueError(
                f"{path} is the result of {record.analysis!r}, not of one of {', '.join(ANALYSES)}; give a file that "
                "peft-uniattn analyze wrote"
            )
        return record

    @property
    def caption(self) -> str:
        """The conditions, for below a plot."""
        device = self.environment["device"]
        data = f"{self.data['sequences']} sequences ({self.data['tokens']:,} tokens) of {self.data['name']}"
        return f"{self.model}; {data}; {device}, {self.environment['dtype']}, seed {self.settings['seed']}"


def environment(model: torch.nn.Module) -> dict[str, Any]:
    """Versions and hardware that results depend on."""
    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(parameter.device) if on_gpu else parameter.device.type.upper(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attn_implementation": model.config.get_text_config(decoder=True)._attn_implementation,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
