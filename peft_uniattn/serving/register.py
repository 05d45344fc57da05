"""What vLLM calls when it starts, in each of its processes."""

from __future__ import annotations

# The stock model classes that followers and leaders are built into, by the transformers class of the base.
SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM")


def register() -> None:
    """Teach vLLM the architectures of standalone checkpoints. Their code is imported when one of them is loaded."""
    from vllm import ModelRegistry

    from ..standalone_modeling import PREFIX

    for name in SERVED:
        ModelRegistry.register_model(PREFIX + name, f"peft_uniattn.serving.models:{PREFIX}{name}")
