"""UniAttn (softmax unification) and its rivals as PEFT methods. Importing this package registers them with PEFT."""

from . import seams  # noqa: F401, before what builds on them
from .calibration import CalibrationReport, calibrate
from .config import UniAttnConfig
from .eviction import H2OCache, disable_h2o, enable_h2o, h2o
from .grouping import choose_superblocks
from .layer import UniAttnLayer
from .model import UniAttnModel
from .registration import CLA, LLMDROP, UNIATTN, register
from .rivals import (
    CLAConfig,
    CLAModel,
    LLMDropConfig,
    LLMDropModel,
    choose_layers_to_drop,
    half_of,
    measure_attention_similarity,
    num_layers_to_drop,
)
from .standalone import to_standalone
from .standalone_modeling import register_auto_classes
from .version import __version__

register(UNIATTN, UniAttnConfig, UniAttnModel)
register(CLA, CLAConfig, CLAModel)
register(LLMDROP, LLMDropConfig, LLMDropModel)
register_auto_classes()

__all__ = [
    "CLA",
    "LLMDROP",
    "UNIATTN",
    "CLAConfig",
    "CLAModel",
    "CalibrationReport",
    "H2OCache",
    "LLMDropConfig",
    "LLMDropModel",
    "UniAttnConfig",
    "UniAttnLayer",
    "UniAttnModel",
    "__version__",
    "calibrate",
    "choose_layers_to_drop",
    "choose_superblocks",
    "disable_h2o",
    "enable_h2o",
    "h2o",
    "half_of",
    "measure_attention_similarity",
    "num_layers_to_drop",
    "to_standalone",
]
