"""What the two-stage recipe may be told: TRL's own argument classes and ours, from YAML and flags alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from trl import ModelConfig, SFTConfig, TrlParser
from yaml import YAMLError

from ..calibration import check_method
from ..compensation import DESIGNS, NONE
from ..config import UniAttnConfig
from ..named import as_flag, parse_superblocks
from .data import DataArguments
from .distillation.arguments import DistillationArguments
from .early_stop import METRICS, EarlyStop

STAGES = ("calibrate", "stage1", "stage2")
METHODS = ("uniattn", "cla", "llmdrop")
EARLY_STOPS = ("none", *METRICS)
# What may change between two calls of one run: where and how it is watched and published, not what it computes.
_OPERATIONAL = {
    "output_dir",
    "overwrite_output_dir",
    "stages",
    "keep_checkpoints",
    "resume_from_checkpoint",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "logging_dir",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "disable_tqdm",
    "push_to_hub",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataset_num_proc",
    "save_total_limit",
    "local_rank",
    "ddp_timeout",
}


@dataclass
class PlanArguments:
    """
    Which layers share a softmax; see [`UniAttnConfig`]. Or one of the rivals: see `peft_uniattn.rivals`.

    Raises:
        ValueError: for a plan that no model can have, or a `superblocks` or `dropped_layers` that cannot be read.
    """

    superblock_size: int = field(default=4, metadata={"help": "Layers per Superblock: one leader, the others follow."})
    start_layer: int | None = field(
        default=None, metadata={"help": "First layer of the lowest Superblock. Default: half of the layers."}
    )
    end_layer: int | None = field(
        default=None, metadata={"help": "Where the Superblocks stop, exclusive. Default: the number of layers."}
    )
    superblocks: str | None = field(
        default=None,
        metadata={
            "help": "Explicit Superblocks such as '16-19,20-23'; overrides the three arguments above, '' does not."
        },
    )
    follower_mask: str = field(
        default="own",
        metadata={
            "help": "Models with sliding windows: 'own' shares between layers with the same mask only, 'leader' lets "
            "followers take the mask of a leader with full attention.",
            "choices": ["own", "leader"],
        },
    )
    rank: int | None = field(default=None, metadata={"help": "Rank of the compensation W_c. Default: full."})
    method: str = field(
        default="uniattn",
        metadata={
            "help": "'uniattn', or a rival, which has nothing to calibrate and no stage 1: 'cla' (followers use the "
            "leader's keys and values), 'llmdrop' (dropped_layers go without attention).",
            "choices": list(METHODS),
        },
    )
    compensation: str = field(
        default="attention_output",
        metadata={
            "help": "With method 'uniattn': where the compensation reads and adds; see UniAttnConfig.",
            "choices": [*DESIGNS, NONE],
        },
    )
    dropped_layers: str | None = field(
        default=None, metadata={"help": "With method 'llmdrop': layers counted from 0, such as '18,21,19'."}
    )

    def __post_init__(self) -> None:
        # The only way for a flag to take back what a file or an earlier flag says.
        self.superblocks = as_flag(self.superblocks) if self.superblocks else None
        if self.dropped_layers is not None:
            self.dropped_layers = as_flag(self.dropped_layers)
        if (self.dropped_layers is not None) != (self.method == "llmdrop"):
            raise ValueError(
                f"dropped_layers={self.dropped_layers!r} does not go with method={self.method!r}; llmdrop needs it, "
                "the others have none"
            )
        if self.superblocks is not None and self.method == "llmdrop":
            raise ValueError(
                f"superblocks={self.superblocks!r} does not go with method='llmdrop', which has no Superblocks; name "
                "layers by dropped_layers"
            )
        if self.rank is not None and self.method != "uniattn":
            raise ValueError(
                f"rank={self.rank} is of UniAttn's compensation, and method={self.method!r} has none; leave rank out"
            )
        self.peft_config()

    def peft_config(self) -> PeftConfig:
        """The configuration for `get_peft_model`."""
        if self.method == "llmdrop":
            from ..rivals import LLMDropConfig

            return LLMDropConfig(task_type="CAUSAL_LM", layers=parse_layers(self.dropped_layers))
        plan = {
            "superblock_size": self.superblock_size,
            "start_layer": self.start_layer,
            "end_layer": self.end_layer,
            "superblocks": None if self.superblocks is None else parse_superblocks(self.superblocks),
            "follower_mask": self.follower_mask,
        }
        if self.method == "cla":
            from ..rivals import CLAConfig

            return CLAConfig(task_type="CAUSAL_LM", **plan)
        return UniAttnConfig(task_type="CAUSAL_LM", r=self.rank, compensation=self.compensation, **plan)


@dataclass
class RecipeArguments:
    """
    What is done with the plan, the data and the training arguments.

    `SFTConfig` is stage 2's; stage 1 inherits it except for what `stage1_*` says.
    """

    stages: str = field(
        default=",".join(STAGES),
        metadata={"help": "Which steps to run, any of 'calibrate,stage1,stage2'. What output_dir has is used."},
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "Path or Hub name of an adapter that the first of the stages starts from."},
    )
    zero_init: bool = field(
        default=False,
        metadata={"help": "Let stage 2 start from W_c = 0 where no adapter is there (the paper's ablation, Table 2)."},
    )
    calibration_method: str = field(
        default="ridge",
        metadata={"help": "'ridge' (least squares over tokens) or 'pseudoinverse' (the paper's)."},
    )
    calibration_ridge: float = field(
        default=1e-2, metadata={"help": "Strength of the ridge, relative to the mean square of the inputs."}
    )
    calibration_examples: int = field(default=1000, metadata={"help": "Training examples that calibration reads."})
    stage1_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of stage 1. Default: learning_rate."}
    )
    stage1_max_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps of stage 1. Default: max_steps."}
    )
    stage1_num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of stage 1. Default: num_train_epochs."}
    )
    stage1_early_stop: str = field(
        default="none",
        metadata={
            "help": "When stage 1 stops before its last step: 'none', 'train_loss' (no further fall of the moving "
            "average of the training loss, the paper's rule), 'eval_loss' (at evaluations; needs eval_strategy).",
            "choices": list(EARLY_STOPS),
        },
    )
    stage1_early_stop_decay: float = field(
        default=0.99, metadata={"help": "How much of the moving average of the training loss a step keeps."}
    )
    stage1_early_stop_patience: int = field(
        default=100, metadata={"help": "Steps without a new minimum after which stage 1 stops."}
    )
    stage1_early_stop_min_delta: float = field(
        default=0.0, metadata={"help": "By how many nats a new minimum must be lower than the last."}
    )
    compare_with_base: bool = field(
        default=False, metadata={"help": "Also fine-tune the unmodified base as in stage 2, to compare."}
    )
    held_out_examples: int = field(
        default=256, metadata={"help": "Held-out examples for the losses of the receipt. 0: none."}
    )
    evaluation: str | None = field(
        default=None,
        metadata={
            "help": "Further evaluation after every step, as 'module:function'; it is called with model and tokenizer "
            "and returns a dict of numbers for receipt and model cards."
        },
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Keep the trainer's checkpoints when a stage has finished."}
    )
    hub_adapter_id: str | None = field(
        default=None,
        metadata={"help": "With push_to_hub: where stage 1's adapter goes. Default: hub_model_id with '-adapter'."},
    )

    def __post_init__(self) -> None:
        self.stages = as_flag(self.stages)
        names = [name.strip() for name in self.stages.split(",") if name.strip()]
        if names == ["none"] and self.compare_with_base:
            names = []
        elif not names or not set(names) <= set(STAGES):
            raise ValueError(
                f"stages={self.stages!r} must name some of {', '.join(STAGES)}, separated by commas; or 'none' with "
                "compare_with_base, to fine-tune the unmodified base alone"
            )
        self.stages = ",".join(name for name in STAGES if name in names) or "none"
        check_method(self.calibration_method)
        for name in ("calibration_examples", "stage1_max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} leaves nothing to do; use 1 or more")
        if self.held_out_examples < 0:
            raise ValueError(f"held_out_examples={self.held_out_examples} must be 0 (no held-out losses) or more")
        if self.evaluation is not None and ":" not in self.evaluation:
            raise ValueError(f"evaluation={self.evaluation!r} must be 'module:function', such as 'my_tasks:accuracy'")
        self.early_stop()

    def early_stop(self) -> EarlyStop | None:
        """The callback that ends stage 1 early, or None."""
        if self.stage1_early_stop == "none":
            return None
        return EarlyStop(
            self.stage1_early_stop,
            decay=self.stage1_early_stop_decay,
            patience=self.stage1_early_stop_patience,
            min_delta=self.stage1_early_stop_min_delta,
        )

    def runs(self, stage: str) -> bool:
        """Whether `stage` is to be run."""
        return stage in self.stages.split(",")

    @property
    def trained(self) -> list[str]:
        """What is to be trained: stages, and the unmodified base as "plain"."""
        return [stage for stage in ("stage1", "stage2") if self.runs(stage)] + ["plain"] * self.compare_with_base


@dataclass(frozen=True)
class Arguments:
    """Everything that one call of the recipe was told, by topic, in the order of [`argument_parser`]."""

    model: ModelConfig
    data: DataArguments
    plan: PlanArguments
    recipe: RecipeArguments
    training: SFTConfig
    distillation: DistillationArguments = field(default_factory=DistillationArguments)

    def __post_init__(self) -> None:
        if self.recipe.stage1_early_stop == "eval_loss" and self.training.eval_strategy == "no":
            raise ValueError(
                "stage1_early_stop='eval_loss' needs evaluations; set eval_strategy and eval_steps, or use "
                "'train_loss'"
            )
        if self.plan.method != "uniattn" and self.recipe.stages != "stage2":
            raise ValueError(
                f"method={self.plan.method!r} has nothing to calibrate and no stage 1, but "
                f"stages={self.recipe.stages!r}; set stages=stage2"
            )
        if self.training.completion_only_loss is False:
            raise ValueError(
                "completion_only_loss=False: the recipe trains on answers alone, and prompts carry no loss; leave "
                "completion_only_loss out"
            )
        if self.training.torch_compile and any(map(self.distillation.applies_to, self.recipe.trained)):
            raise ValueError(
                "torch_compile=True does not see what distillation compares; leave torch_compile out, or "
                "distillation_alpha and distillation_attention_weight"
            )

    def settings(self) -> dict[str, Any]:
        """What decides about results, as JSON types; another call with other ones is another run."""
        training = {name: value for name, value in self.training.to_dict().items() if not name.startswith("hub_")}
        groups = (self.model, self.data, self.plan, self.recipe, self.distillation)
        parts = [dataclasses.asdict(part) for part in groups]
        merged = {name: value for part in (*parts, training) for name, value in part.items()}
        return {name: value for name, value in merged.items() if name not in _OPERATIONAL | {"hub_adapter_id"}}


def argument_parser(prog: str | None = None) -> TrlParser:
    """The parser of flags and of the YAML file behind `--config`."""
    return TrlParser(
        [ModelConfig, DataArguments, PlanArguments, RecipeArguments, SFTConfig, DistillationArguments],
        prog=prog,
        description="Post-train a model in two stages: plan, calibrate, stage 1 (W_c alone), stage 2 (everything). "
        "The training arguments are stage 2's; stage 1 inherits them but for stage1_*. --config FILE.yaml takes any "
        "of the arguments, and flags override it.",
        epilog="Example: %(prog)s --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name data.jsonl --max_length 1024 "
        "--learning_rate 1e-5 --stage1_learning_rate 1e-4 --output_dir out. The same command continues an "
        "interrupted run.",
    )


def parse_arguments(argv: Sequence[str] | None = None, *, prog: str | None = None) -> Arguments:
    """
    Read flags, and the YAML file behind `--config` which they override.

    Args:
        argv: the flags; default those of the process.
        prog: the program's name in the help.

    Raises:
        ValueError: for values that cannot be meant, naming the argument.
        SystemExit: for unknown flags and for `--help`, as argparse does it.
    """
    try:
        return Arguments(*argument_parser(prog).parse_args_and_config(argv))
    except FileNotFoundError as error:
        raise ValueError(f"config={error.filename!r} does not exist; give the path of a YAML file") from error
    except YAMLError as error:
        raise ValueError(f"config cannot be read as YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        unused = str(error).partition("not used by the HfArgumentParser: ")[2]
        if unused:
            raise ValueError(f"unknown arguments: {unused}; --help lists those that there are") from error
        if "use_cpu" in str(error):
            raise ValueError(
                "bf16=True needs a GPU, and PyTorch finds none here; add --use_cpu --bf16 false to train on the CPU"
            ) from error
        raise


def parse_layers(text: str) -> list[int]:
    """
    Layers from a text such as "18,21,19", counted from 0.

    Raises:
        ValueError: if it is not of that form.
    """
    layers = text.split(",")
    if not all(layer.strip().isdigit() for layer in layers):
        raise ValueError(f"dropped_layers={text!r} must look like '18,21,19': layers counted from 0")
    return [int(layer) for layer in layers]
