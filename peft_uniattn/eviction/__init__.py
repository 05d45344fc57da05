"""H2O: a KV cache that keeps heavy hitters and recent tokens (https://arxiv.org/abs/2306.14048)."""

from .cache import H2OCache
from .listening import disable_h2o, enable_h2o, h2o

__all__ = ["H2OCache", "disable_h2o", "enable_h2o", "h2o"]
