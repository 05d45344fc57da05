"""Standalone models in vLLM: the stock model class of the base, with leaders and followers built in."""

from __future__ import annotations

import vllm

from ..standalone_modeling import standalone_plan
from .limits import check_version

check_version(vllm.__version__)

from vllm.config import VllmConfig  # noqa: E402
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM  # noqa: E402
from vllm.model_executor.models.llama import LlamaForCausalLM  # noqa: E402
from vllm.model_executor.models.mistral import MistralForCausalLM  # noqa: E402
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM  # noqa: E402
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM  # noqa: E402

from .attention import become_follower, become_leader, share_one_block_table  # noqa: E402
from .follower import FollowerSelfAttention, projecting_values_only  # noqa: E402
from .pages import value_pages  # noqa: E402


class UniAttnServed:
    """Builds the plan of a standalone checkpoint into a stock model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        plan = standalone_plan(config)
        with projecting_values_only(type(self), plan.followers):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        layers = self.model.layers
        attentions = [layer.self_attn.attn for layer in layers]
        pages = value_pages(plan.superblocks)
        for leader, *followers in plan.superblocks:
            become_leader(attentions[leader])
            for layer in followers:
                page = pages[layer]
                become_follower(
                    attentions[layer],
                    attentions[leader],
                    page=page,
                    owner=attentions[page.owner],
                    is_last=layer == followers[-1],
                )
                layers[layer].self_attn = FollowerSelfAttention(
                    layers[layer].self_attn, config, vllm_config.quant_config
                )
        share_one_block_table(attentions)


class UniAttnLlamaForCausalLM(UniAttnServed, LlamaForCausalLM):
    pass


class UniAttnMistralForCausalLM(UniAttnServed, MistralForCausalLM):
    pass


class UniAttnQwen2ForCausalLM(UniAttnServed, Qwen2ForCausalLM):
    pass


class UniAttnQwen3ForCausalLM(UniAttnServed, Qwen3ForCausalLM):
    pass


class UniAttnGemma2ForCausalLM(UniAttnServed, Gemma2ForCausalLM):
    pass
