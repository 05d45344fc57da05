"""UniAttn as a tuner of PEFT: what it asks of a model on top of what all methods ask."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from .compensation import DESIGNS, FFN_OUTPUT
from .config import UniAttnConfig
from .families import Decoder, find_decoder, find_family
from .handover import install_deferral, remove_deferral
from .inspection import find_adapter
from .layer import UniAttnLayer
from .plan import Plan
from .probe import check_sharing
from .tuner.model import AttentionTuner


class UniAttnModel(AttentionTuner):
    """
    Unifies the softmax of Superblocks of decoder layers (https://arxiv.org/abs/2502.00439).

    Created by `get_peft_model(model, UniAttnConfig(...))`. The followers' outputs change even while the compensation
    is zero, so an adapter is only useful after `calibrate` and training.

    Args:
        model ([`~transformers.PreTrainedModel`]): the decoder-only model to adapt.
        config ([`UniAttnConfig`]): the configuration.
        adapter_name (`str`): the name of the adapter.
        low_cpu_mem_usage (`bool`): create the compensation on the meta device.

    Raises:
        ValueError: if the architecture, the attention implementation or the plan is not supported, or if a saved
            adapter belongs to a base model of another shape. Nothing has been changed then.
    """

    prefix: str = "uniattn_"
    tuner_layer_cls = UniAttnLayer
    adapter_content = "the compensation"

    def _check_config(self, peft_config: UniAttnConfig, config: Any) -> None:
        if peft_config.r is not None and peft_config.r > config.hidden_size:
            raise ValueError(
                f"r={peft_config.r} is larger than the model's hidden size of {config.hidden_size}; use a smaller "
                "rank, or None for the full compensation"
            )
        if getattr(config, "attention_dropout", 0):
            warnings.warn(
                f"attention_dropout={config.attention_dropout}: in training, leader and followers drop different "
                "probabilities; set config.attention_dropout = 0 to share exactly",
                stacklevel=2,
            )

    def _check_model(self, decoder: Decoder, plan: Plan) -> None:
        bare = [layer for layer in plan.leader_of if not isinstance(decoder.attention(layer), UniAttnLayer)]
        check_sharing(self.model, decoder, bare)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """
        Turn on gradient checkpointing as on the model itself, but leave the embeddings' output without gradient.

        transformers gives it one for the sake of reentrant checkpointing, which UniAttn refuses. Backward passes would
        then recompute and cross all layers below the lowest follower, where nothing is trained.
        """
        self._checkpoint(self.model.gradient_checkpointing_enable, gradient_checkpointing_kwargs, kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """[`gradient_checkpointing_enable`] under its name since transformers 5.23."""
        self._checkpoint(self.model.activation_checkpointing_enable, activation_checkpointing_kwargs, kwargs)

    def _checkpoint(self, enable: Callable[..., None], options: dict[str, Any] | None, kwargs: dict[str, Any]) -> None:
        self.model.disable_input_require_grads()
        enable(options, **kwargs)
        if not (options or {}).get("use_reentrant", False):
            self.model.disable_input_require_grads()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        adapter = find_adapter(model, adapter_name)
        decoder = find_decoder(model, find_family(self._text_config()))
        for block in adapter.plan.superblocks:
            decoder.attention(block[0]).uniattn_followers[adapter_name] = len(block) - 1
        design = DESIGNS.get(adapter.compensation)
        if design is not None and design.adds == FFN_OUTPUT:
            for layer in adapter.plan.followers:
                install_deferral(decoder.layers[layer], layer)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for layer in find_decoder(model, find_family(self._text_config())).layers:
            remove_deferral(layer)
        return model
