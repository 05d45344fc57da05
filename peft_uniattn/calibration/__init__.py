"""W_c from data, before any training (Theorem 3.7 and Algorithm 1 of https://arxiv.org/abs/2502.00439)."""

from .calibrate import calibrate, check_method
from .report import CalibrationReport, FollowerError

__all__ = ["CalibrationReport", "FollowerError", "calibrate", "check_method"]
