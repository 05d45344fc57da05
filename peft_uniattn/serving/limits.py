"""What is refused before any weight is read, one sentence each: versions, engine settings, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version
from transformers import PretrainedConfig

from ..compensation import NONE
from ..plan import SOFTMAX

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

OLDEST, NEXT = "0.32", "0.33"
PLAIN = ("auto", "float16", "bfloat16", "float32")  # data types of a cache that is not quantized


def is_supported(version: str) -> bool:
    """Whether `version` of vLLM is one whose internals this package was tested against."""
    try:
        return Version(OLDEST) <= Version(version) < Version(NEXT)
    except InvalidVersion:  # "dev", of a build that does not know
        return False


def check_version(version: str) -> None:
    """Raise ImportError unless `version` of vLLM is supported."""
    if not is_supported(version):
        raise ImportError(
            f"UniAttn checkpoints are served by vLLM from {OLDEST} up to, but without, {NEXT}, and this is vLLM "
            f"{version}; install vllm=={OLDEST}.*"
        )


def check_checkpoint(config: PretrainedConfig) -> None:
    """Raise ValueError for a standalone checkpoint that transformers runs, but the engine does not."""
    if config.dropped_layers or config.shared != SOFTMAX:
        raise ValueError(
            "only checkpoints that share softmax are served, not those of CLA or LLMDrop; run them with transformers"
        )
    if config.compensation not in ("attention_output", NONE):
        raise ValueError(
            f"compensation={config.compensation!r} is not served, only 'attention_output' and 'none' are; run the "
            "checkpoint with transformers"
        )


def check_engine(config: VllmConfig) -> None:
    """Raise ValueError for engine settings under which followers would be wrong, or were never tried."""
    ranks, heads = config.parallel_config.tensor_parallel_size, config.model_config.get_total_num_kv_heads()
    rank = config.model_config.hf_config.compensation_rank or 0  # of W_c, unlike ranks
    refused = {
        "pipeline_parallel_size > 1": config.parallel_config.pipeline_parallel_size > 1,
        "decode_context_parallel_size > 1": config.parallel_config.decode_context_parallel_size > 1,
        "prefill_context_parallel_size > 1": config.parallel_config.prefill_context_parallel_size > 1,
        f"tensor_parallel_size={ranks} and {heads} key-value heads, which it does not divide": heads % ranks != 0,
        f"tensor_parallel_size={ranks} and compensation_rank={rank}, which it does not divide": rank % ranks != 0,
        "speculative decoding": config.speculative_config is not None,
        f"kv_cache_dtype={config.cache_config.cache_dtype!r}": config.cache_config.cache_dtype not in PLAIN,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
        "a KV connector": config.kv_transfer_config is not None,
    }
    for setting, present in refused.items():
        if present:
            raise ValueError(f"UniAttn checkpoints are not served with {setting}; change that setting")


class Limits:
    """What vLLM asks about a model before it starts processes for it."""

    @staticmethod
    def verify_and_update_config(config: VllmConfig) -> None:
        check_checkpoint(config.model_config.hf_config)
        check_engine(config)

    @staticmethod
    def verify_and_update_model_config(config: ModelConfig) -> None:
        """Nothing to add to the configuration of the model."""
