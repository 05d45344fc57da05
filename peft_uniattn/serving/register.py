"""What vLLM calls when it starts, in each of its processes."""

from __future__ import annotations

# The stock model classes that followers and leaders are built into, by the transformers class of the base.
SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM")


def register() -> None:
    """Teach vLLM the architectures of standalone checkpoints. Their code is imported when one of them is loaded."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ..standalone_modeling import PREFIX
    from .limits import Limits

    for name in SERVED:
        ModelRegistry.register_model(PREFIX + name, f"peft_uniattn.serving.models:{PREFIX}{name}")
        MODELS_CONFIG_MAP[PREFIX + name] = Limits
