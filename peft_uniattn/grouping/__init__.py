"""Superblocks chosen by measurements: cheapest by calibration error or loss, or most similar softmax activations."""

from .choose import choose_superblocks

__all__ = ["choose_superblocks"]
