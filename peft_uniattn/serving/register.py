"""What vLLM calls when it starts, in each of its processes."""

from __future__ import annotations

from .limits import Limits, is_supported

# The stock model classes that followers and leaders are built into, by the transformers class of the base.
SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM")


def register() -> None:
    """
    Teach vLLM the architectures of standalone checkpoints. Their code is imported when one of them is loaded.

    Other models are served with this package installed as they are without it, whatever the version of vLLM.
    """
    import vllm

    from ..standalone_modeling import PREFIX

    for name in SERVED:
        vllm.ModelRegistry.register_model(PREFIX + name, f"peft_uniattn.serving.models:{PREFIX}{name}")
    if not is_supported(vllm.__version__):
        return  # what follows are internals; the models' own code says what is wrong
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP.update({PREFIX + name: Limits for name in SERVED})
