"""The methods that the UniAttn paper compares with, in the same interface."""

from .cla import CLAConfig, CLALayer, CLAModel
from .llmdrop import LLMDropConfig, LLMDropLayer, LLMDropModel
from .similarity import choose_layers_to_drop, measure_attention_similarity
from .variants import half_of, num_layers_to_drop

__all__ = [
    "CLAConfig",
    "CLALayer",
    "CLAModel",
    "LLMDropConfig",
    "LLMDropLayer",
    "LLMDropModel",
    "choose_layers_to_drop",
    "half_of",
    "measure_attention_similarity",
    "num_layers_to_drop",
]
