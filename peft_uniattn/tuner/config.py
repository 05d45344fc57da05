"""What the user may say about any method that wraps attention modules."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import transformers
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from ..cards import tell_how_to_load
from ..plan import Plan, check_superblock_size, check_superblocks, make_plan, shortened
from ..version import __version__, check_release


@dataclass
class AttentionConfig(PeftConfig):
    """
    What PEFT and this package note about every adapter that wraps attention modules.

    Args:
        target_modules (`list[str]`, *optional*):
            Filled in from the plan: the attention modules it concerns. Leave it `None`.
        modules_to_save (`list[str]`, *optional*):
            Other modules to train and save with the adapter.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Token embeddings to train and save with the adapter.
        base_layout (`dict`, *optional*):
            Filled in on injection: shape of the base model, so that loading onto another one is refused.
        base_commit (`str`, *optional*):
            Filled in on injection: the commit of the base model's repository, if it came from the Hub.
        uniattn_version, transformers_version (`str`, *optional*):
            Filled in: the releases in use. A file of a later release than the installed one is refused.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Filled in from the plan: the attention modules that it concerns. Leave it None."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Other modules to train and save with the adapter, such as ['lm_head']."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Token embeddings to train and save with the adapter."},
    )
    base_layout: dict | None = field(
        default=None,
        metadata={"help": "Filled in on injection: the base model's shape, so that another base is refused."},
    )
    base_commit: str | None = field(
        default=None,
        metadata={"help": "Filled in on injection: the commit of the base model's repository, if it is in the Hub."},
    )
    uniattn_version: str | None = field(
        default=None, metadata={"help": "The release that wrote this; a later one than the installed is refused."}
    )
    transformers_version: str | None = field(default=None, metadata={"help": "The release of transformers in use."})

    def __post_init__(self):
        super().__post_init__()
        check_release(self.uniattn_version)
        self.uniattn_version, self.transformers_version = __version__, transformers.__version__
        _check_names("modules_to_save", self.modules_to_save)
        if not isinstance(self.target_modules, str):
            _check_names("target_modules", self.target_modules)
        _check_token_indices(self.trainable_token_indices)
        if not isinstance(self.base_layout, dict | None):
            raise ValueError(f"base_layout={self.base_layout!r} must be None, or what injection filled in")
        if not isinstance(self.base_commit, str | None):
            raise ValueError(f"base_commit={self.base_commit!r} must be None, or what injection filled in")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> AttentionConfig:
        """Read a saved configuration, and remember from where: injection checks the weights beside it first."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / CONFIG_NAME} cannot be used: {shortened(str(error))}") from error
        if folder.is_dir():
            config._read = folder, config._essence()
        return config

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the configuration, and into a README that PEFT has just made how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        tell_how_to_load(Path(save_directory), self.peft_type.value)

    def weights_folder(self) -> Path | None:
        """The folder of the adapter that this is the unchanged configuration of; None if there is none."""
        folder, essence = getattr(self, "_read", (None, None))
        return folder if self.base_layout is not None and essence == self._essence() else None

    def _essence(self) -> dict[str, Any]:
        """What decides which weights belong to this configuration."""
        unrelated = {field.name for field in fields(PeftConfig)}
        return {name: value for name, value in asdict(self).items() if name not in unrelated}

    def make_plan(self, num_layers: int, masks: list[str] | None = None) -> Plan:
        """
        What this configuration means for a model.

        Args:
            num_layers: the model's number of decoder layers.
            masks: the kind of mask of every layer (`config.layer_types`); None if all are alike.
        """
        raise NotImplementedError(f"{type(self).__name__} has to say which layers it concerns")


@dataclass
class SuperblockConfig(AttentionConfig):
    """
    A configuration of Superblocks: consecutive decoder layers of which the lowest leads and the others follow.

    Args:
        superblock_size (`int`, defaults to 4):
            Layers per Superblock, 2 or more.
        start_layer (`int`, *optional*):
            First layer of the lowest Superblock. Defaults to half of the model's layers, rounded down.
        end_layer (`int`, *optional*):
            Where the Superblocks stop, exclusive. Defaults to the number of layers. Layers left over at the top stay
            as they are.
        superblocks (`list[list[int]]`, *optional*):
            Explicit Superblocks as lists of consecutive layer indices; overrides the three arguments above.
        follower_mask (`str`, defaults to `"own"`):
            In models that mix full and sliding-window attention: `"own"` shares only between layers with the same
            mask; `"leader"` lets followers take the mask of a leader with full attention (the paper's Gemma-2 plan).
    """

    superblock_size: int = field(
        default=4, metadata={"help": "Layers per Superblock, 2 or more: one leader, the others followers."}
    )
    start_layer: int | None = field(
        default=None,
        metadata={"help": "First layer of the lowest Superblock. Default: half of the layers, rounded down."},
    )
    end_layer: int | None = field(
        default=None,
        metadata={"help": "Where the Superblocks stop, exclusive. Default: the number of layers."},
    )
    superblocks: list[list[int]] | None = field(
        default=None,
        metadata={
            "help": "Explicit Superblocks as lists of consecutive layer indices, such as [[16, 17, 18], [20, 21]]. "
            "Overrides superblock_size, start_layer and end_layer."
        },
    )
    follower_mask: str = field(
        default="own",
        metadata={
            "help": "In models that mix full and sliding-window attention: 'own' shares only between layers with the "
            "same mask; 'leader' lets followers take the mask of a leader with full attention."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_superblock_size(self.superblock_size)
        if self.follower_mask not in ("own", "leader"):
            raise ValueError(f"follower_mask={self.follower_mask!r} must be 'own' or 'leader'")
        for name in ("start_layer", "end_layer"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name}={value!r} must be None or a layer index from 0 up")
        if self.superblocks is not None:
            check_superblocks(self.superblocks)
            self.superblocks = [list(block) for block in self.superblocks]

    def make_plan(self, num_layers: int, masks: list[str] | None = None) -> Plan:
        """
        The Superblocks that this configuration means for a model.

        Args:
            num_layers: the model's number of decoder layers.
            masks: the kind of mask of every layer (`config.layer_types`); None if all are alike.
        """
        return make_plan(
            num_layers,
            masks=masks,
            follower_mask=self.follower_mask,
            superblock_size=self.superblock_size,
            start_layer=self.start_layer,
            end_layer=self.end_layer,
            superblocks=self.superblocks,
        )


def _check_names(name: str, value: object) -> None:
    # PEFT turns lists into sets at times.
    if value is None or (isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)):
        return
    raise ValueError(f"{name}={value!r} must be None or a list of names of modules, such as ['lm_head']")


def _check_token_indices(value: object) -> None:
    lists = list(value.values()) if isinstance(value, dict) else [[] if value is None else value]
    if all(
        isinstance(items, (list, tuple)) and all(type(item) is int and item >= 0 for item in items) for items in lists
    ):
        return
    raise ValueError(
        f"trainable_token_indices={value!r} must be None, a list of token ids from 0 up, or a dictionary of such "
        "lists by the name of the embedding"
    )
