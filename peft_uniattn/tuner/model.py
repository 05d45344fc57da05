"""Puts a method that wraps attention modules into a model, and takes it out again; nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn
from transformers.utils import CONFIG_NAME as TRANSFORMERS_CONFIG_NAME

from ..attention import refuse_continuous_batching
from ..families import Decoder, check_back_end, find_decoder, find_family
from ..handover import install_handover, remove_handover
from ..inspection import uniattn_layers
from ..plan import Plan, shortened
from .config import AttentionConfig
from .files import PREFIX, Shapes, check_weight_file, optional_shapes, shapes_of_extra_parts
from .layer import AttentionTunerLayer


class AttentionTuner(BaseTuner):
    """
    Wraps the attention modules that a plan concerns, and lets every forward carry a hand-over to them.

    A method names its layer class in `tuner_layer_cls`, and checks models and configurations of its own in
    `_check_config` and `_check_model`.

    Args:
        model ([`~transformers.PreTrainedModel`]): the decoder-only model to adapt.
        config ([`AttentionConfig`]): the configuration.
        adapter_name (`str`): the name of the adapter.
        low_cpu_mem_usage (`bool`): create the adapter's weights on the meta device.

    Raises:
        ValueError: if the architecture, the attention implementation or the plan is not supported, or if a saved
            adapter belongs to a base model of another shape. Nothing has been changed then.
    """

    tuner_layer_cls: type[AttentionTunerLayer]
    target_module_mapping: dict[str, list[str]] = {}
    # What an adapter file holds, for messages.
    adapter_content: str

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_adapter_is_new(model, adapter_name)  # before PEFT notes the new configuration in place of the old one
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: AttentionConfig, model_config: dict) -> AttentionConfig:
        config = self._text_config()
        decoder = find_decoder(self.model, find_family(config))
        check_back_end(config._attn_implementation)
        layout = base_layout(config)
        _check_layout(peft_config, layout)
        plan = self._plan(peft_config)
        self._check_config(peft_config, config)
        targets = {decoder.attention_name(layer) for layer in plan.role_of}
        _check_targets(peft_config, targets)
        _check_modules_to_save(peft_config, self.model, targets)
        _check_not_offloaded(decoder, plan)
        _check_no_other_method(self.model, self.tuner_layer_cls)
        if folder := peft_config.weights_folder():
            expected = self._saved_shapes(peft_config, decoder, plan)
            check_weight_file(folder, expected, optional_shapes(peft_config, self.model))
        self._check_model(decoder, plan)
        peft_config.target_modules = sorted(targets)
        peft_config.base_layout = layout
        if peft_config.base_commit is None:
            peft_config.base_commit = base_commit(self.model.config, peft_config.revision)
        return peft_config

    def _check_config(self, peft_config: AttentionConfig, config: Any) -> None:
        """Raise ValueError if `peft_config` does not suit a model with the (text) configuration `config`."""

    def _check_model(self, decoder: Decoder, plan: Plan) -> None:
        """Raise ValueError if the method would not do on this model what it should."""

    def _saved_shapes(self, peft_config: AttentionConfig, decoder: Decoder, plan: Plan) -> Shapes:
        """Shapes of what an adapter file for `peft_config` has to hold, by name in the model."""
        return {**shapes_of_extra_parts(peft_config, self.model), **self._own_shapes(peft_config, decoder, plan)}

    def _own_shapes(self, peft_config: AttentionConfig, decoder: Decoder, plan: Plan) -> Shapes:
        """The same without `modules_to_save` and trained tokens."""
        shapes: Shapes = {}
        hidden_size = self._text_config().hidden_size
        for layer in (*plan.followers, *plan.dropped):
            attention = decoder.attention(layer)
            bare = attention.base_layer if isinstance(attention, AttentionTunerLayer) else attention
            own = self.tuner_layer_cls.saved_shapes(bare, decoder.family, hidden_size, peft_config)
            shapes.update({f"{decoder.attention_name(layer)}.{name}": shape for name, shape in own.items()})
        return shapes

    def _plan(self, peft_config: AttentionConfig) -> Plan:
        config = self._text_config()
        return peft_config.make_plan(config.num_hidden_layers, getattr(config, "layer_types", None))

    def _text_config(self) -> Any:
        config = getattr(self.model, "config", None)
        if not hasattr(config, "get_text_config"):
            method, found = self.tuner_layer_cls.method, type(self.model).__name__
            raise ValueError(f"{found} is not a transformers model; {method} needs a PreTrainedModel")
        return config.get_text_config(decoder=True)

    def _create_and_replace(
        self,
        peft_config: AttentionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        config = self._text_config()
        plan = self._plan(peft_config)
        if not isinstance(target, self.tuner_layer_cls):
            layer = self.tuner_layer_cls(target, find_family(config), config.hidden_size)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, peft_config, plan.role_of[target.layer_idx])

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version looks for child.weight, which an attention module does not have.
        setattr(parent, child_name, new_module)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        # A copy, because what is found out about this model is noted in it; the user may need theirs for another one.
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        try:
            _check_adapter_name(adapter_name)
            # The plan decides which modules are adapted; a state dict has no entry for leaders.
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
            )
        except (ValueError, OSError, SafetensorError):
            self._forget(model, adapter_name)
            raise
        # Every wrapped layer knows every adapter, so that after a deletion all of them pick the same next one.
        layers = uniattn_layers(model)
        names = {name for layer in layers for name in layer.uniattn_leader}
        for layer in layers:
            for name in names:
                layer.uniattn_leader.setdefault(name, None)
        install_handover(find_decoder(model, layers[0].family).backbone)
        # On the model itself, from which generate_batch() is called, rather than on this wrapper.
        model.init_continuous_batching = refuse_continuous_batching

    def _forget(self, model: nn.Module, adapter_name: str) -> None:
        """Undo what PEFT and transformers note about an adapter before they try to inject it."""
        self.peft_config.pop(adapter_name, None)
        if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
            model._hf_peft_config_loaded = False

    def _check_merge_allowed(self) -> None:
        raise self.tuner_layer_cls.merge_refusal()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """
        The standalone model of the active adapter, what it has learned as ordinary weights; see [`to_standalone`].

        Like PEFT's other methods it consumes this model: the two share their weights.

        Args:
            progressbar: without effect, there is nothing to wait for.
            safe_merge: refuse a compensation with NaN or infinite values.
            adapter_names: the one adapter to use instead of the active one.
        """
        from ..standalone import to_standalone

        if adapter_names is not None and len(adapter_names) != 1:
            raise ValueError(
                f"adapter_names={adapter_names} must name exactly one {self.tuner_layer_cls.method} adapter"
            )
        name = adapter_names[0] if adapter_names else None
        return to_standalone(self, adapter_name=name, share_weights=True, check_finite=safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise self.tuner_layer_cls.merge_refusal()
        layers = uniattn_layers(self.model)
        if not layers:  # unloaded before
            return self.model
        backbone = find_decoder(self.model, layers[0].family).backbone
        model = super()._unload_and_optionally_merge(False, *args, **kwargs)
        for layer in layers:
            layer.unwrap()
        remove_handover(backbone)
        del model.init_continuous_batching
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={shortened(repr(kwargs['adapter_names']))}: a {self.tuner_layer_cls.method} adapter "
                "answers all rows of a batch; call set_adapter(), or disable_adapter(), and give it one batch each"
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AttentionConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # Also for an adapter that is there already, whose file nobody has looked at: PEFT would leave out what does
        # not fit, and overwrite weights of the base. Of processes that hold no weights, none are asked for.
        if isinstance(tuner := getattr(model, "base_model", None), AttentionTuner) and state_dict:
            tuner._check_loaded_names(config, adapter_name, set(state_dict))
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )

    def _check_loaded_names(self, config: AttentionConfig, adapter_name: str, names: set[str]) -> None:
        """Raise ValueError unless `names` are those of an adapter like the one that they are loaded into."""
        decoder = find_decoder(self.model, find_family(self._text_config()))
        plan = self._plan(config)
        names = {name.removeprefix(PREFIX) for name in names}
        expected = set(self._own_shapes(config, decoder, plan))
        wrappers = tuple(
            f"{name}." for name, module in self.model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
        )
        others = names - expected - set(optional_shapes(config, self.model))
        wrong = sorted(expected - names) or sorted(name for name in others if not name.startswith(wrappers))
        if wrong:
            have = "lack" if wrong[0] in expected else "hold"
            raise ValueError(
                f"adapter {adapter_name!r} is {plan}, and the weights to load into it {have} "
                f"{shortened(repr(wrong[0]))}: they are of another adapter; give another adapter_name, or weights of "
                "the same configuration"
            )

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        _check_base_is_frozen(model, cls.adapter_content)
        return super()._get_adapter_state_dict(model, *args, **kwargs)


def base_layout(config: Any) -> dict[str, int | str]:
    """The shape of a base model, as far as an adapter depends on it."""
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
    }


def base_commit(config: Any, revision: str | None) -> str | None:
    """
    The commit of the Hub's repository that a model came from; None if it came from elsewhere.

    Args:
        config: the model's configuration.
        revision: where in the repository, as PEFT notes it; None is its main branch.
    """
    # transformers noted it before 5.24; since then, the Hub's cache knows what the revision stood at.
    if commit := getattr(config, "_commit_hash", None):
        return commit
    name = config.name_or_path
    if not name or Path(name).exists():
        return None
    try:
        file = try_to_load_from_cache(name, TRANSFORMERS_CONFIG_NAME, revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def _check_adapter_name(name: str) -> None:
    # It becomes the name of a folder when it is saved, and of a module, where PyTorch refuses it half-way.
    if not name or any(character in name for character in "./\\\0") or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name={name!r} cannot be the name of a folder and of a module; use letters, digits, '-' and '_'"
        )


def _check_adapter_is_new(model: nn.Module, name: str) -> None:
    # The layers of both plans would be wrapped then, and neither adapter be what its configuration says.
    if any(name in layer.uniattn_leader for layer in uniattn_layers(model)):
        raise ValueError(
            f"adapter_name={name!r}: this model has an adapter of that name from an earlier call; unload() that one "
            "first, load the base anew, or give another name to add_adapter()"
        )


def _check_layout(peft_config: AttentionConfig, layout: dict[str, int | str]) -> None:
    saved = peft_config.base_layout
    if saved is not None and saved != layout:
        differing = [name for name, value in layout.items() if saved.get(name) != value]
        differences = ", ".join(
            f"{name}={shortened(repr(saved.get(name)))} instead of {layout[name]!r}" for name in differing
        )
        commit = f" at commit {peft_config.base_commit}" if peft_config.base_commit else ""
        raise ValueError(
            f"this adapter was made for another base model ({differences}); load the base it names: "
            f"{peft_config.base_model_name_or_path!r}{commit}"
        )


def _check_targets(peft_config: AttentionConfig, targets: set[str]) -> None:
    given = peft_config.target_modules
    if given is None:
        return
    missed = sorted(name for name in targets if not BaseTuner._check_target_module_exists(peft_config, name))
    if missed:
        raise ValueError(
            f"target_modules={shortened(repr(given))} does not match {missed[0]!r}, which the plan "
            "needs; leave target_modules None, and choose the layers with superblocks or start_layer and end_layer"
        )


def _check_modules_to_save(peft_config: AttentionConfig, model: nn.Module, targets: set[str]) -> None:
    inside = tuple(f"{target}." for target in targets)
    for name, _ in model.named_modules():
        hit = next((end for end in peft_config.modules_to_save or () if name.endswith(end)), None)
        if hit and name.replace(".base_layer.", ".").startswith(inside):
            raise ValueError(
                f"modules_to_save={shortened(repr(peft_config.modules_to_save))} names {name!r}, which is "
                "inside an attention module that the adapter wraps; leave it out, or train it in the model that "
                "to_standalone() returns"
            )


def _check_no_other_method(model: nn.Module, layer_class: type[AttentionTunerLayer]) -> None:
    # Anywhere, also where the two concern different layers: one hand-over and one standalone model have one method.
    for attention in uniattn_layers(model):
        if not isinstance(attention, layer_class):
            raise ValueError(
                f"decoder layer {attention.layer_idx} has a {attention.method} adapter already, and a "
                f"{layer_class.method} adapter cannot be put around or beside it; unload that one first"
            )


def _check_not_offloaded(decoder: Decoder, plan: Plan) -> None:
    """Raise ValueError if accelerate fetches weights of wrapped layers on use: it would not fetch a compensation."""
    for layer in plan.role_of:
        attention = decoder.attention(layer)
        if any(p.is_meta for p in attention.parameters()) and any(hasattr(m, "_hf_hook") for m in attention.modules()):
            raise ValueError(
                f"decoder layer {layer} is offloaded to the CPU or to disk, and a compensation would not be fetched "
                "with it; give it a device in device_map, or offload the model that to_standalone() returns instead"
            )


def trainable_base_parameters(model: nn.Module) -> list[str]:
    """Names of parameters that are trainable and belong to no adapter."""
    kept = {id(p) for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper) for p in m.parameters()}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            containers = [getattr(module, name) for name in module.adapter_layer_names]
            kept.update(id(p) for container in containers for p in container.parameters())
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]


def _check_base_is_frozen(model: nn.Module, adapter_content: str) -> None:
    """Raise ValueError if base weights are being trained: an adapter file would silently lose them."""
    if any(layer.base_was_trained for layer in uniattn_layers(model)):
        raise ValueError(
            "the base model's attention was trained together with the adapter, but an adapter file holds only "
            f"{adapter_content}, so that training would be lost; save to_standalone(model) instead"
        )
    if trained := trainable_base_parameters(model):
        raise ValueError(
            f"{trained[0]} is trainable, but an adapter file holds only {adapter_content}, so its training would be "
            "lost; save to_standalone(model) instead, or freeze the base with requires_grad_(False)"
        )
