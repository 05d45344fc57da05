"""UniAttn (softmax unification) as a PEFT method. Importing this package registers `UNIATTN` with PEFT."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .calibration import CalibrationReport, calibrate
from .config import UniAttnConfig
from .layer import UniAttnLayer
from .model import UniAttnModel
from .registration import UNIATTN
from .standalone import to_standalone
from .standalone_modeling import register_auto_classes

__version__ = "0.1.0"

if UNIATTN not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="uniattn", config_cls=UniAttnConfig, model_cls=UniAttnModel, prefix="uniattn_")
register_auto_classes()

__all__ = [
    "UNIATTN",
    "CalibrationReport",
    "UniAttnConfig",
    "UniAttnLayer",
    "UniAttnModel",
    "__version__",
    "calibrate",
    "to_standalone",
]
