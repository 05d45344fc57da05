"""What is refused: in words that name the argument, its value and the way out, and before anything is changed."""

from __future__ import annotations

import re
from contextlib import contextmanager

import conftest
import pytest
import torch
from conftest import changed, tiny_adapter, tiny_model, transformers_adapters, weights
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

from peft_uniattn import CLAConfig, UniAttnConfig, UniAttnLayer, to_standalone

SMALL = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GOOD = {"superblocks": [[1, 2], [3, 4]]}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=32, n_head=4, **SMALL)).eval()


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(n_layer=4, hidden_size=32, n_head=4, **SMALL)).eval()


def with_back_end(name):
    """Set as a model would have it that was loaded where this back end is installed."""
    model = tiny_model()
    model.config._attn_implementation = name
    return model


def half_sliding():
    return tiny_model("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=2)


def matches(*parts):
    """A pattern for a message that has all `parts`, in this order."""
    return re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)


# Refused by the configuration itself: arguments, and what the message has to say.
CONFIGURATIONS = [
    ({"superblock_size": 1}, "superblock_size=1", "2 or more"),
    ({"superblock_size": "4"}, "superblock_size='4'", "integer of 2 or more"),
    ({"superblock_size": 2.0}, "superblock_size=2.0", "integer of 2 or more"),
    ({"superblock_size": True}, "superblock_size=True", "integer of 2 or more"),
    ({"start_layer": -1}, "start_layer=-1", "from 0 up"),
    ({"start_layer": "3"}, "start_layer='3'", "from 0 up"),
    ({"end_layer": 1.5}, "end_layer=1.5", "from 0 up"),
    ({"end_layer": False}, "end_layer=False", "from 0 up"),
    ({"superblocks": []}, "superblocks=[]", "such as [[16, 17, 18]]"),
    ({"superblocks": "16-18"}, "superblocks='16-18'", "such as [[16, 17, 18]]"),
    ({"superblocks": [16, 17]}, "superblocks contains 16", "list of layer indices"),
    ({"superblocks": [[-1, 0]]}, "superblocks contains [-1, 0]", "from 0 up"),
    ({"superblocks": [["1", "2"]]}, "superblocks contains ['1', '2']", "list of layer indices"),
    ({"superblocks": [[3]]}, "superblocks contains [3]", "2 layers or more"),
    ({"superblocks": [[1, 3]]}, "superblocks contains [1, 3]", "list every layer from the leader up"),
    ({"superblocks": [[2, 1]]}, "superblocks contains [2, 1]", "list every layer from the leader up"),
    ({"superblocks": [[1, 2], [2, 3]]}, "superblocks=[[1, 2], [2, 3]]", "layer 2 twice", "leave it in one of them"),
    ({"r": 0}, "r=0", "None", "1 or more"),
    ({"r": "8"}, "r='8'", "None", "1 or more"),
    ({"r": True}, "r=True", "None", "1 or more"),
]


@pytest.mark.parametrize(("arguments", "words"), [pytest.param(a, w, id=w[0]) for a, *w in CONFIGURATIONS])
def test_an_impossible_configuration_is_refused(arguments, words):
    with pytest.raises(ValueError, match=matches(*words)):
        UniAttnConfig(**arguments)


OTHER_LAYOUT = {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 48}
# Refused when it meets a model: the model, the configuration, and what the message has to say.
INJECTIONS = {
    "gpt2": (gpt2, {"superblock_size": 2}, "model_type='gpt2'", "llama", "use a base model"),
    "bloom": (bloom, {"superblock_size": 2}, "model_type='bloom'", "llama", "use a base model"),
    "flash_attention_3": (
        lambda: with_back_end("flash_attention_3"),
        GOOD,
        "attn_implementation='flash_attention_3'",
        "eager, sdpa",
        'set_attn_implementation("sdpa")',
    ),
    "paged": (
        lambda: with_back_end("paged|eager"),
        GOOD,
        "attn_implementation='paged|eager'",
        "eager, sdpa",
        'set_attn_implementation("sdpa")',
    ),
    "rank": (tiny_model, {**GOOD, "r": 33}, "r=33", "hidden size of 32", "smaller rank, or None"),
    "size": (tiny_model, {"superblock_size": 7}, "superblock_size=7", "use smaller Superblocks or a wider range"),
    "start": (tiny_model, {"start_layer": 6}, "start_layer=6", "6 decoder layers", "use 0 to 5"),
    "end": (tiny_model, {"end_layer": 7}, "end_layer=7", "6 decoder layers", "use 0 to 6"),
    "range": (tiny_model, {"start_layer": 4, "end_layer": 2}, "start_layer=4", "end_layer=2", "a wider range"),
    "layer": (
        tiny_model,
        {"superblocks": [[5, 6]]},
        "superblocks=[[5, 6]]",
        "6 decoder layers",
        "leave that layer out",
    ),
    "masks": (half_sliding, {"superblocks": [[1, 2]]}, "[1, 2]", "full_attention", "sliding_attention", "choose"),
    "targets": (
        tiny_model,
        {**GOOD, "target_modules": ["q_proj"]},
        "target_modules=['q_proj']",
        "model.layers.1.self_attn",
        "leave target_modules None",
    ),
    # PEFT cannot train a module inside one that a tuner wraps.
    "inner_module": (
        tiny_model,
        {**GOOD, "modules_to_save": ["v_proj"]},
        "modules_to_save",
        "v_proj",
        "to_standalone",
    ),
    "layout": (tiny_model, {**GOOD, "base_layout": OTHER_LAYOUT}, "hidden_size=48 instead of 32", "load the base"),
}


def cases(*, supported: bool = False):
    """Parameters of all injections, or only of those whose model is fine with another configuration."""
    unsupported = ("gpt2", "bloom", "flash_attention_3", "paged")
    return pytest.mark.parametrize(
        ("make", "arguments", "words"),
        [
            pytest.param(make, arguments, words, id=name)
            for name, (make, arguments, *words) in INJECTIONS.items()
            if not (supported and name in unsupported)
        ],
    )


def logits(model):
    config, back_end = model.config, model.config._attn_implementation
    if back_end not in ("eager", "sdpa"):
        # Not installed, or not for this processor.
        config._attn_implementation = "sdpa"
    result = conftest.logits(model)
    config._attn_implementation = back_end
    return result


@contextmanager
def untouched(model):
    """Check that what happens inside leaves `model` as it is, bit for bit."""
    before, expected, modules = weights(model), logits(model), describe(model)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    config = model.config.to_dict()
    yield
    assert describe(model) == modules
    assert not changed(before, weights(model))
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), expected)


def describe(model) -> list:
    return [
        (name, type(module), id(getattr(module, "config", None)), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@cases()
def test_get_peft_model_refuses_and_leaves_the_model_as_it_was(make, arguments, words):
    model = make()
    with untouched(model), pytest.raises(ValueError, match=matches(*words)):
        get_peft_model(model, UniAttnConfig(**arguments))
    assert not any(isinstance(module, UniAttnLayer) for module in model.modules())
    assert not hasattr(model, "peft_config")


@transformers_adapters
@cases()
def test_add_adapter_of_transformers_refuses_and_leaves_the_model_as_it_was(make, arguments, words):
    model = make()
    with untouched(model), pytest.raises(ValueError, match=matches(*words)):
        model.add_adapter(UniAttnConfig(**arguments))
    assert not getattr(model, "peft_config", {})


@cases(supported=True)
def test_a_second_adapter_is_refused_and_the_first_kept(make, arguments, words):
    model = tiny_adapter(make(), superblocks=[[2, 3]])
    with untouched(model), pytest.raises(ValueError, match=matches(*words)):
        model.add_adapter("other", UniAttnConfig(**arguments))
    assert (list(model.peft_config), model.active_adapters) == (["default"], ["default"])


@transformers_adapters
@cases(supported=True)
def test_a_second_adapter_of_transformers_is_refused_and_the_first_kept(make, arguments, words):
    model = make()
    model.add_adapter(UniAttnConfig(superblocks=[[2, 3]], init_weights=False))
    with untouched(model), pytest.raises(ValueError, match=matches(*words)):
        model.add_adapter(UniAttnConfig(**arguments), "other")
    assert model.active_adapters() == ["default"]


@transformers_adapters
def test_a_refused_add_adapter_can_be_corrected():
    model = tiny_model()
    with pytest.raises(ValueError, match="superblock_size=7"):
        model.add_adapter(UniAttnConfig(superblock_size=7))
    model.add_adapter(UniAttnConfig(superblock_size=3))
    assert model.active_adapters() == ["default"]


@transformers_adapters
def test_a_refused_second_add_adapter_can_be_corrected():
    model = tiny_model()
    model.add_adapter(UniAttnConfig(superblock_size=3))
    with pytest.raises(ValueError, match="superblock_size=7"):
        model.add_adapter(UniAttnConfig(superblock_size=7), "other")
    assert list(model.peft_config) == ["default"]
    model.add_adapter(UniAttnConfig(superblock_size=2), "other")
    assert model.active_adapters() == ["other"]


def test_a_refused_get_peft_model_can_be_corrected():
    model = tiny_model()
    with pytest.raises(ValueError, match="superblock_size=7"):
        get_peft_model(model, UniAttnConfig(superblock_size=7))
    config = {"superblock_size": 3, "start_layer": 0}
    assert torch.equal(logits(tiny_adapter(model, **config)), logits(tiny_adapter(**config)))


def test_a_refusal_leaves_the_configuration_as_it_was():
    config = UniAttnConfig(superblock_size=7)
    before = config.to_dict()
    with pytest.raises(ValueError, match="superblock_size=7"):
        get_peft_model(tiny_model(), config)
    assert config.to_dict() == before


def test_a_module_of_another_library_is_refused():
    with pytest.raises(ValueError, match="Sequential is not a transformers model; UniAttn needs a PreTrainedModel"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), UniAttnConfig())


def test_a_standalone_model_takes_no_second_sharing():
    model = to_standalone(tiny_adapter())
    with untouched(model), pytest.raises(ValueError, match=matches("model_type='uniattn_llama'")):
        get_peft_model(model, UniAttnConfig(superblock_size=2))


@pytest.mark.parametrize("convert", [to_standalone, lambda model: model.merge_and_unload()], ids=["to", "merge"])
def test_a_quantized_base_is_not_converted(convert):
    model = tiny_adapter()
    model.base_model.model.is_quantized = True
    with (
        untouched(model),
        pytest.raises(ValueError, match=matches("base model is quantized", "load the base unquantized")),
    ):
        convert(model)


def test_conversion_names_the_adapters_there_are():
    model = tiny_adapter()
    with (
        untouched(model),
        pytest.raises(ValueError, match=matches("adapter_name='other'", "use one of", "['default']")),
    ):
        to_standalone(model, "other")


def test_conversion_of_a_disabled_adapter_is_refused():
    model = tiny_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match=matches("pass adapter_name", "['default']")):
        to_standalone(model)


@pytest.mark.parametrize(
    "make",
    [tiny_model, lambda: get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))],
    ids=["base", "lora"],
)
def test_conversion_without_an_adapter_says_how_to_get_one(make):
    with pytest.raises(ValueError, match=matches("has no UniAttn adapter", "get_peft_model(model, UniAttnConfig())")):
        to_standalone(make())


def test_conversion_of_a_module_of_another_library_is_refused():
    with pytest.raises(ValueError, match="Linear holds no transformers model; pass a PeftModel"):
        to_standalone(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["classifier", "backbone"])
def test_conversion_of_anything_but_a_causal_language_model_is_refused_by_name(kind):
    base = tiny_model().model if kind == "backbone" else LlamaForSequenceClassification(tiny_model().config).eval()
    model = tiny_adapter(base, task_type=None)
    with pytest.raises(ValueError, match=matches(type(base).__name__, "causal language model")):
        to_standalone(model)


def checkpoint(folder, **changes):
    """A standalone checkpoint whose configuration was edited."""
    model = to_standalone(tiny_adapter(half_sliding(), superblocks=[[2, 3]]))
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"superblocks": [[4, 5, 6]]}, ["superblocks=[[4, 5, 6]]", "6 decoder layers", "leave that layer out"]),
        ({"superblocks": [[2, 4]]}, ["superblocks contains [2, 4]", "list every layer"]),
        ({"superblocks": [[1, 2]]}, ["[1, 2]", "full_attention", "sliding_attention", "choose"]),
    ],
    ids=["layer", "gap", "masks"],
)
def test_a_standalone_checkpoint_with_an_impossible_plan_is_refused(changes, words, tmp_path):
    with pytest.raises(ValueError, match=matches(*words)):
        AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path, **changes))


def test_a_standalone_checkpoint_refuses_an_unsupported_back_end(tmp_path):
    with pytest.raises(ValueError, match=matches("attn_implementation='paged|eager'", "eager, sdpa")):
        AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path), attn_implementation="paged|eager")


@pytest.mark.parametrize("make", [tiny_adapter, lambda: to_standalone(tiny_adapter())], ids=["adapter", "standalone"])
def test_changing_to_an_unsupported_back_end_is_refused_at_the_next_call(make, ids):
    model = make()
    getattr(model, "base_model", model).set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match=matches("attn_implementation='paged|eager'", "eager, sdpa")):
        model(ids)


def test_a_second_plan_under_the_same_name_is_refused_and_the_first_kept():
    base = tiny_model()
    first = tiny_adapter(base, superblocks=[[0, 1, 2]])
    ids = conftest.prompt()
    before = conftest.logits(first, ids)
    with pytest.raises(
        ValueError, match=r"adapter_name='default': this model has an adapter of that name.*unload\(\)"
    ):
        get_peft_model(base, UniAttnConfig(superblocks=[[3, 4]]))
    assert first.peft_config["default"].superblocks == [[0, 1, 2]]
    assert torch.equal(conftest.logits(first, ids), before)
    assert get_peft_model(first.unload(), UniAttnConfig(superblocks=[[3, 4]]))(ids).logits.shape == before.shape


def test_another_method_on_other_layers_is_refused():
    base = tiny_model()
    tiny_adapter(base, superblocks=[[0, 1, 2]])
    with pytest.raises(
        ValueError, match="has a UniAttn adapter already, and a CLA adapter cannot be put around or beside"
    ):
        get_peft_model(base, CLAConfig(superblocks=[[3, 4]]), adapter_name="second")


def test_batches_of_several_adapters_are_refused():
    model = tiny_adapter()
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match=r"adapter_names=\['__base__', 'default'\]: a UniAttn adapter answers all"
        ):
            call(input_ids=conftest.prompt(), adapter_names=["__base__", "default"])


def test_unloading_twice_is_unloading_once():
    model = tiny_adapter()
    assert model.unload() is model.unload()
