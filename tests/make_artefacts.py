"""
Stores what this release writes, for later releases to load: `python tests/make_artefacts.py`, once a release.

A tiny base model, adapters of it, a standalone model and the logits of each go to `tests/artefacts/<version>`, with a
manifest of versions and hashes. The tree has to be clean, so that the commit in the manifest is what wrote the files.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from conftest import logits, loud, moved, tiny_adapter, tiny_model
from safetensors.torch import save_file

import peft_uniattn
from peft_uniattn import to_standalone

ARTEFACTS = Path(__file__).parent / "artefacts"
ADAPTERS = {
    "full": {"superblocks": [[1, 2]]},
    "low_rank": {"superblocks": [[0, 1], [2, 3]], "r": 2},
    "heads": {"superblocks": [[2, 3]], "compensation": "heads"},
    "none": {"superblocks": [[1, 2, 3]], "compensation": "none"},
}
LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def check_clean(root: Path) -> str:
    """The commit of the tree at `root`; raises ValueError if anything in it is not committed."""
    status = _git(root, "status", "--porcelain")
    if status:
        raise ValueError(f"the tree is not clean ({status.splitlines()[0].strip()}); commit or remove that first")
    return _git(root, "rev-parse", "HEAD")


def write(folder: Path, commit: str) -> None:
    """Write base, adapters, standalone model, logits and manifest into `folder`, which must not exist."""
    folder.mkdir(parents=True)
    base = make_base()
    base.save_pretrained(folder / "base")
    expected = {"input_ids": prompt_ids()}
    expected["base"] = logits(base.double(), prompt_ids())
    for name, config in ADAPTERS.items():
        model = moved(tiny_adapter(make_base(), **config))
        model.save_pretrained(folder / name)
        if name == "low_rank":
            standalone = to_standalone(model)
            standalone.save_pretrained(folder / "standalone")
            expected["standalone"] = logits(standalone.double(), prompt_ids())
        expected[name] = logits(model.double(), prompt_ids())
    save_file(expected, folder / "expected.safetensors")
    # Model cards, and the code that runs where this package is not installed, would be most of the bytes.
    for file in [*folder.rglob("*.md"), *folder.rglob("*.py")]:
        file.unlink()
    manifest = {
        "version": peft_uniattn.__version__,
        "commit": commit,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "sha256": hashes(folder),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def make_base():
    """In float32, with weights that matter."""
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    return loud(tiny_model(dtype=torch.float32, tie_word_embeddings=True, **shape))


def prompt_ids() -> torch.Tensor:
    return torch.tensor([[2, 7, 1, 8, 28, 18], [3, 14, 15, 9, 26, 5]])


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder` but the manifest, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    try:
        write(ARTEFACTS / peft_uniattn.__version__, check_clean(Path(__file__).parent))
    except (ValueError, FileExistsError) as error:
        sys.exit(f"nothing written: {error}")
