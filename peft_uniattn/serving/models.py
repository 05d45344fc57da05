"""Standalone models in vLLM: the stock model class of the base, with leaders and followers built in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import vllm

from ..standalone_modeling import standalone_plan
from .limits import check_checkpoint, check_engine, check_version

check_version(vllm.__version__)

from vllm.config import VllmConfig  # noqa: E402
from vllm.model_executor.model_loader.weight_utils import default_weight_loader  # noqa: E402
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM  # noqa: E402
from vllm.model_executor.models.llama import LlamaForCausalLM  # noqa: E402
from vllm.model_executor.models.mistral import MistralForCausalLM  # noqa: E402
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM  # noqa: E402
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM  # noqa: E402

from .attention import become_follower, become_leader, share_one_block_table  # noqa: E402
from .follower import FollowerSelfAttention  # noqa: E402
from .pages import value_pages  # noqa: E402


class UniAttnServed:
    """Builds the plan of a standalone checkpoint into a stock model, and loads what that has no place for."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        plan = standalone_plan(config)
        check_checkpoint(config)
        check_engine(vllm_config)
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
        self.follower_prefixes = tuple(f"model.layers.{layer}.self_attn.v_proj." for layer in pages)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own: set[str] = set()
        loaded = super().load_weights(self._load_values(weights, own))
        return loaded | own

    def _load_values(
        self, weights: Iterable[tuple[str, torch.Tensor]], loaded: set[str]
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Load the followers' V projections, which stock models would fuse with Q and K, and yield all else."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if not name.startswith(self.follower_prefixes):
                yield name, tensor
                continue
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            loaded.add(name)


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
