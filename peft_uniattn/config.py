"""What the user may say about UniAttn."""

from __future__ import annotations

from dataclasses import dataclass, field

from .compensation import NONE, check_design
from .kernels import check_kernels
from .registration import UNIATTN
from .tuner.config import SuperblockConfig


@dataclass
class UniAttnConfig(SuperblockConfig):
    """
    Configuration of a [`UniAttnModel`].

    Consecutive decoder layers form Superblocks. The lowest layer of a Superblock, its leader, computes
    softmax(QKᵀ); the others, its followers, reuse that softmax with their own value and output projections, cache no
    keys, and get a linear compensation W_c (https://arxiv.org/abs/2502.00439, equation 14).

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
        r (`int`, *optional*):
            Rank of the compensation. `None` (the default) is the full matrix of hidden size by hidden size.
        compensation (`str`, defaults to `"attention_output"`):
            Where the compensation reads and adds (the paper's Table 8): `"attention_output"` reads the normalised
            input of attention and adds to its output after W_o; `"ffn_output"` reads the same and adds to the output
            of the decoder layer, after the FFN; `"heads"` reads the same and adds before W_o; `"values_to_heads"`
            reads the follower's own value states and adds before W_o; `"input_and_heads"` reads the input and s·V and
            adds after W_o, so that W_o is fitted as well. `"none"` compensates nothing.
        init_weights (`bool`, defaults to `True`):
            Start with a compensation of zero; `calibrate` replaces it. `False` starts at random, for tests.
        kernels (`str`, defaults to `"auto"`):
            Fused kernels in inference: `"auto"` (Triton's where they are faster), `"off"` (PyTorch only) or `"triton"`
            (Triton's at every size). The environment variable `UNIATTN_KERNELS` overrides it.
        skip_mass (`float`, defaults to 0.0):
            How much of the probability mass of a row the kernels' followers may leave out to be faster, below 1. 0
            leaves out nothing.
        target_modules (`list[str]`, *optional*):
            Filled in from the plan: the attention modules of leaders and followers. Leave it `None`.
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

    r: int | None = field(
        default=None,
        metadata={"help": "Rank of the compensation W_c. Default: full (hidden size by hidden size)."},
    )
    compensation: str = field(
        default="attention_output",
        metadata={
            "help": "Where the compensation reads and adds: 'attention_output', 'ffn_output' or 'heads' (before W_o), "
            "from the input of attention; 'values_to_heads', from the values; 'input_and_heads', after W_o, from the "
            "input and s·V, which corrects W_o; or 'none'."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start with a compensation of zero. False starts at random, for tests."},
    )
    kernels: str = field(
        default="auto",
        metadata={
            "help": "Fused kernels in inference: 'auto' (Triton's where they are faster), 'off' (PyTorch only) or "
            "'triton' (Triton's at every size). The environment variable UNIATTN_KERNELS overrides it."
        },
    )
    skip_mass: float = field(
        default=0.0,
        metadata={
            "help": "How much of a row's probability mass the kernels' followers may leave out to be faster, below 1. "
            "0 leaves out nothing."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = UNIATTN
        check_kernels(self.kernels, self.skip_mass)
        check_design(self.compensation)
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise ValueError(f"r={self.r!r} must be None (full compensation) or an integer of 1 or more")
        if self.r is not None and self.compensation == NONE:
            raise ValueError(
                f"r={self.r} is the rank of a compensation, but compensation='none'; leave one of them out"
            )
