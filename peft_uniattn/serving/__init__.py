"""
Standalone UniAttn checkpoints in vLLM.

vLLM finds `register` through the entry-point group `vllm.general_plugins`, so that having this package installed is
enough. Nothing here imports vLLM before vLLM itself calls `register`.
"""

from .register import register

__all__ = ["register"]
