"""The presets in `configs/` mean what the paper's Tables 4 to 6 say, and their plans fit the models' shapes."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from peft_uniattn.inspection import find_adapter
from peft_uniattn.training.arguments import parse_arguments

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "accelerate"
)
ACCELERATE = {path.stem: str(path) for path in CONFIGS.glob("accelerate/*.yaml")}

# Tables 4, 5 and 6, typed from the paper, which counts layers from 1.
LEARNING_RATES = {"llama-2-7b": 2e-5, "llama-3.1-8b": 7e-6, "mistral-7b": 1e-6, "gemma-2-9b": 1e-6}
TOP_HALF = [(17, 20), (21, 24), (25, 28), (29, 32)]
GEMMA = [(22, 25), (26, 29), (30, 33), (34, 37), (38, 41)]
SUPERBLOCKS = {name: GEMMA if name == "gemma-2-9b" else TOP_HALF for name in LEARNING_RATES}
CLA = {
    "half": {name: GEMMA[2:] if name == "gemma-2-9b" else TOP_HALF[2:] for name in LEARNING_RATES},
    "full": SUPERBLOCKS,
}
LLMDROP = {
    "half": {
        "llama-2-7b": [23, 20, 32, 27, 22, 24],
        "llama-3.1-8b": [19, 22, 20, 21, 27, 23],
        "mistral-7b": [17, 32, 31, 21, 22, 24],
        "gemma-2-9b": [29, 26, 21, 30, 27, 40, 38, 31],
    },
    "full": {
        "llama-2-7b": [23, 20, 32, 27, 22, 24, 31, 29, 25, 30, 28, 26],
        "llama-3.1-8b": [19, 22, 20, 21, 27, 23, 30, 29, 28, 26, 24, 25],
        "mistral-7b": [17, 32, 31, 21, 22, 24, 29, 23, 28, 25, 27, 26],
        "gemma-2-9b": [29, 26, 21, 30, 27, 40, 38, 31, 32, 33, 35, 39, 36, 37, 34],
    },
}
# Four tenths of the layers follow.
FOR_REPRODUCE = {
    f"{model}/{data}.yaml": followers
    for model, followers in {"smollm2-135m": 12, "qwen2.5-0.5b": 10}.items()
    for data in ("choices", "medical")
}
DATA = {"pmc": ["axiong/pmc_llama_instructions"], "tulu3": ["allenai/tulu-3-sft-mixture"]}
# The published shapes: name on the Hub, configuration, number of parameters.
SHAPES = {
    "llama-2-7b": (
        "meta-llama/Llama-2-7b-hf",
        LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
        6_738_415_616,
    ),
    "llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        8_030_261_248,
    ),
    "mistral-7b": (
        "mistralai/Mistral-7B-v0.1",
        MistralConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            sliding_window=4096,
        ),
        7_241_732_096,
    ),
    "gemma-2-9b": (
        "google/gemma-2-9b",
        Gemma2Config(
            vocab_size=256000,
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
            sliding_window=4096,
        ),
        9_241_705_984,
    ),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        134_515_008,
    ),
    "qwen2.5-0.5b": (
        "Qwen/Qwen2.5-0.5B",
        Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        494_032_768,
    ),
}

all_presets = pytest.mark.parametrize("preset", PRESETS)
papers_models = pytest.mark.parametrize("model", LEARNING_RATES)
variants = pytest.mark.parametrize("variant", ["half", "full"])


def parsed(preset: str):
    """The arguments of a preset, by the recipe's own parser."""
    if Path(preset).stem.startswith(("cla-", "llmdrop-")):
        pytest.importorskip("peft_uniattn.rivals")
    # bf16 is refused where there is no GPU, unless the CPU is asked for.
    return parse_arguments(["--config", str(CONFIGS / preset), "--use_cpu", "true"])


def built(preset: str):
    """The model of a preset without weights, with its plan applied."""
    _, config, size = SHAPES[Path(preset).parent.name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        assert sum(weight.numel() for weight in model.parameters()) == size
        return get_peft_model(model, parsed(preset).plan.peft_config())


def plan(preset: str):
    return find_adapter(built(preset)).plan


def groups(preset: str) -> list[tuple[int, int]]:
    """First and last layer of every Superblock, counted from 1."""
    return [(block[0] + 1, block[-1] + 1) for block in plan(preset).superblocks]


def check_training(arguments, model: str) -> None:
    training = arguments.training
    assert arguments.model.model_name_or_path == SHAPES[model][0]
    assert training.learning_rate == LEARNING_RATES[model]
    assert training.weight_decay == 0
    # The paper trained on 8 GPUs.
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 48
    assert (training.num_train_epochs, training.max_steps) == (1, -1)
    assert (training.lr_scheduler_type, training.warmup_steps) == ("cosine", 0.03)
    assert (training.max_length, training.bf16) == (1024, True)
    assert (arguments.model.dtype, arguments.data.prompt_style) == ("float32", "paper")


@papers_models
@pytest.mark.parametrize("data", DATA)
def test_uniattn_has_the_hyperparameters_of_table_4(model, data):
    arguments = parsed(f"{model}/{data}.yaml")
    check_training(arguments, model)
    recipe = arguments.recipe
    assert (arguments.plan.method, arguments.data.dataset_name) == ("uniattn", DATA[data])
    assert arguments.data.dataset_format == {"pmc": "instruction", "tulu3": "tulu3"}[data]
    assert (recipe.stages, recipe.calibration_method) == ("calibrate,stage1,stage2", "pseudoinverse")
    assert (recipe.calibration_examples, recipe.stage1_early_stop) == (1000, "train_loss")
    assert (recipe.stage1_learning_rate, arguments.plan.rank) == (None, None)
    assert groups(f"{model}/{data}.yaml") == SUPERBLOCKS[model]


@papers_models
@variants
def test_cla_has_the_hyperparameters_of_table_5(model, variant):
    preset = f"{model}/cla-{variant}.yaml"
    arguments = parsed(preset)
    check_training(arguments, model)
    assert (arguments.plan.method, arguments.recipe.stages) == ("cla", "stage2")
    assert groups(preset) == CLA[variant][model]


@papers_models
@variants
def test_llmdrop_has_the_hyperparameters_of_table_6(model, variant):
    preset = f"{model}/llmdrop-{variant}.yaml"
    arguments = parsed(preset)
    check_training(arguments, model)
    assert (arguments.plan.method, arguments.recipe.stages) == ("llmdrop", "stage2")
    dropped = LLMDROP[variant][model]
    assert arguments.plan.peft_config().layers == [layer - 1 for layer in dropped]
    assert sorted(plan(preset).dropped) == sorted(layer - 1 for layer in dropped)


@pytest.mark.parametrize(("model", "blocks"), [("smollm2-135m", 3), ("qwen2.5-0.5b", 3)])
@pytest.mark.parametrize("data", DATA)
def test_small_models_fit_one_gpu_with_the_papers_batch(model, blocks, data):
    preset = f"{model}/{data}.yaml"
    arguments = parsed(preset)
    training = arguments.training
    assert (arguments.model.model_name_or_path, arguments.data.dataset_name) == (SHAPES[model][0], DATA[data])
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 48
    assert (training.num_train_epochs, training.max_length, arguments.data.max_rows) == (1, 1024, 20000)
    assert len(plan(preset).superblocks) == blocks


def test_the_thrifty_presets_name_bitsandbytes_4_bit_base_and_8_bit_paged_adamw():
    first, second = (parsed(f"llama-3.1-8b/{name}.yaml") for name in ("stage1-4bit", "stage2-8bit-adamw"))
    assert (first.model.load_in_4bit, first.model.bnb_4bit_quant_type, first.model.use_bnb_nested_quant) == (
        True,
        "nf4",
        True,
    )
    assert (first.recipe.stages, second.recipe.stages) == ("calibrate,stage1", "stage2")
    assert (second.training.optim, second.model.load_in_4bit) == ("paged_adamw_8bit", False)
    assert second.recipe.adapter == f"{first.training.output_dir}/adapter"
    for arguments in (first, second):
        assert arguments.training.per_device_train_batch_size * arguments.training.gradient_accumulation_steps == 48


@all_presets
def test_every_preset_builds_its_model_without_weights(preset):
    assert all(weight.is_meta for weight in built(preset).parameters())


@all_presets
def test_every_preset_writes_to_a_directory_of_its_own(preset):
    model, name = Path(preset).parent.name, Path(preset).stem
    assert parsed(preset).training.output_dir == f"out/{model}-{name}"


def test_a_rival_with_stages_that_it_does_not_have_is_refused():
    pytest.importorskip("peft_uniattn.rivals")
    with pytest.raises(ValueError, match="set stages=stage2"):
        parse_arguments(["--method", "cla", "--use_cpu", "true"])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--method", "llmdrop"],
        ["--dropped_layers", "3"],
        ["--method", "llmdrop", "--dropped_layers", "3", "--superblocks", "0-2"],
        ["--method", "cla", "--rank", "4"],
    ],
)
def test_arguments_of_another_method_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^(dropped_layers|superblocks|rank)="):
        parse_arguments([*wrong, "--stages", "stage2", "--use_cpu", "true"])


LLMDROP_FLAGS = ["--method", "llmdrop", "--stages", "stage2"]


@pytest.fixture
def from_yaml(tmp_path):
    """Parses the text of a YAML file."""

    def parse(text):
        (tmp_path / "recipe.yaml").write_text(f"use_cpu: true\nbf16: false\n{text}\n")
        return parse_arguments(["--config", str(tmp_path / "recipe.yaml")])

    return parse


@pytest.mark.parametrize(
    ("yaml", "flags"),
    [
        ("superblocks: [[0, 1, 2], [3, 4]]", ["--superblocks", "0-2,3-4"]),
        ("superblocks: [0-2, 3-4]", ["--superblocks", "0-2,3-4"]),
        ("superblocks: []", []),
        ("stages: [calibrate, stage1]", ["--stages", "calibrate,stage1"]),
        ("distillation_stages: [stage1, stage2]", ["--distillation_stages", "stage1,stage2"]),
        ("dropped_layers: 4\nmethod: llmdrop\nstages: [stage2]", [*LLMDROP_FLAGS, "--dropped_layers", "4"]),
        ("dropped_layers: [4, 2]\nmethod: llmdrop\nstages: stage2", [*LLMDROP_FLAGS, "--dropped_layers", "4,2"]),
    ],
)
def test_lists_of_yaml_say_what_flags_say(yaml, flags, from_yaml):
    assert from_yaml(yaml).settings() == parse_arguments(["--use_cpu", "true", "--bf16", "false", *flags]).settings()


@pytest.mark.parametrize("wrong", ["[[0, 3], [4, 7]]", "[[]]", "[[a, b]]", "3", "[[5]]"])
def test_superblocks_of_yaml_that_cannot_be_meant_are_refused_by_name(wrong, from_yaml):
    with pytest.raises(ValueError, match=r"^superblocks=.*(must look like '16-19,20-23'|has no follower)"):
        from_yaml(f"superblocks: {wrong}")


def test_yaml_that_cannot_be_read_is_refused_with_its_file(from_yaml):
    with pytest.raises(ValueError, match=r"config cannot be read as YAML: .*recipe.yaml\", line \d"):
        from_yaml("superblocks: [[0, 1]")


@pytest.mark.parametrize("weight", ["distillation_alpha", "distillation_attention_weight"])
def test_compiled_distillation_is_refused_before_anything_runs(weight):
    flags = [f"--{weight}", "0.5", "--torch_compile", "true", "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(ValueError, match="torch_compile=True does not see what distillation compares"):
        parse_arguments(flags)
    parse_arguments([*flags, "--stages", "calibrate"])


def test_a_loss_on_prompts_is_refused_by_name():
    flags = ["--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(ValueError, match="completion_only_loss=False: the recipe trains on answers alone"):
        parse_arguments([*flags, "--completion_only_loss", "false"])
    parse_arguments([*flags, "--completion_only_loss", "true"])


@pytest.mark.parametrize(("preset", "followers"), FOR_REPRODUCE.items())
def test_presets_for_reproduce_say_their_steps_and_keep_the_papers_batch(preset, followers):
    training = parsed(preset).training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 48
    assert training.max_steps > 0
    assert len(plan(preset).followers) == followers


def test_every_preset_is_tested_by_name():
    named = {f"{model}/{data}.yaml" for model in SHAPES for data in DATA}
    named |= {
        f"{model}/{rival}-{half}.yaml" for model in LEARNING_RATES for rival in ("cla", "llmdrop") for half in CLA
    }
    named |= {f"llama-3.1-8b/{name}.yaml" for name in ("stage1-4bit", "stage2-8bit-adamw")}
    assert set(PRESETS) == named | FOR_REPRODUCE.keys()


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` makes of a configuration: its arguments, and the environment of the processes."""

    def run(name: str, *flags: str):
        caught = []
        for launcher in ("multi_gpu_launcher", "deepspeed_launcher"):
            monkeypatch.setattr(launch, launcher, caught.append)
        command = ["--config_file", ACCELERATE[name], *flags, "script.py"]
        launch.launch_command(launch.launch_command_parser().parse_args(command))
        (arguments,) = caught
        if arguments.use_deepspeed:
            return arguments, launch.prepare_deepspeed_cmd_env(arguments)[1]
        return arguments, launch.prepare_multi_gpu_env(arguments)

    return run


@pytest.fixture
def within(monkeypatch):
    """Make the environment of launched processes this one's."""

    def enter(environment):
        for name, value in environment.items():
            if os.environ.get(name) != value:
                monkeypatch.setenv(name, value)

    return enter


def test_every_accelerate_configuration_is_tested_by_name():
    assert set(ACCELERATE) == {"ddp", "fsdp2", "zero2", "zero3", "multi_node"}


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_loads_and_launches_every_configuration(name, launched):
    config = load_config_from_file(ACCELERATE[name])
    arguments, _ = launched(name)
    assert config.mixed_precision == arguments.mixed_precision == "bf16"
    assert arguments.num_processes == 8 * arguments.num_machines
    assert arguments.num_machines == (2 if name == "multi_node" else 1)
    chosen = {"ddp": "multi_gpu", "zero2": "use_deepspeed", "zero3": "use_deepspeed"}.get(name, "use_fsdp")
    found = [flag for flag in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(arguments, flag)]
    assert found == [chosen]


@pytest.mark.parametrize("name", ["fsdp2", "multi_node"])
def test_fsdp_is_version_2_and_wraps_decoder_layers(name, launched, within):
    within(launched(name)[1])
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    model = built("smollm2-135m/pmc.yaml").base_model.model
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.model.layers[0])}


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_shards_after_loading_and_takes_the_trainers_batch(name, stage, launched, within):
    within(launched(name)[1])
    plugin = DeepSpeedPlugin()
    config = plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == stage
    assert not plugin.zero3_init_flag
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


def test_machines_are_told_apart_by_flags(launched):
    arguments, environment = launched("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert (arguments.machine_rank, arguments.main_process_ip) == (1, "10.0.0.1")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
