"""The base model and its tokenizer, as TRL's model arguments name them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig, get_quantization_config

from ..named import load_named_tokenizer, named_checkpoint


def check_model(model: ModelConfig) -> None:
    """Raise ValueError unless the arguments name a model that the recipe can train."""
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing; give a checkpoint's folder or its name on the Hub")
    if model.use_peft:
        raise ValueError("use_peft=True asks for LoRA; the adapter of stage 1 is UniAttn's, so leave it out")


def load_tokenizer(model: ModelConfig, training: SFTConfig) -> PreTrainedTokenizerBase:
    """
    The model's tokenizer, with a padding token, and with chat template and end of sequence as the arguments say.

    Raises:
        ValueError: if there is none, if it has neither padding nor end of sequence, or if `chat_template_path` is
            not a file.
    """
    tokenizer = load_named_tokenizer(
        "model_name_or_path",
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=training.trust_remote_code,
    )
    if training.eos_token is not None:
        tokenizer.eos_token = training.eos_token
    if training.chat_template_path is not None:
        path = Path(training.chat_template_path)
        if not path.is_file():
            raise ValueError(
                f"chat_template_path={str(path)!r} is not a file; give a Jinja file whose tokens the tokenizer knows"
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {model.model_name_or_path} has neither padding nor end of sequence; give eos_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: ModelConfig, training: SFTConfig) -> PreTrainedModel:
    """The base model, whole, on the CPU; a quantized one on the device of this process."""
    options: dict[str, Any] = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    if (quantization := get_quantization_config(model)) is not None:
        options.update(quantization_config=quantization, device_map={"": training.device})
    with whole_weights(), named_checkpoint("model_name_or_path", model.model_name_or_path):
        return AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path, **options, **(training.model_init_kwargs or {})
        )


@contextmanager
def whole_weights() -> Iterator[None]:
    """
    Load models whole in every process, even where they are to be sharded later.

    Raises:
        ValueError: if DeepSpeed is set up to shard weights while they are loaded.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed would shard the weights while they are loaded, before their layers can be unified; set "
            "zero3_init_flag: false in the accelerate configuration"
        )
    with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
        yield
