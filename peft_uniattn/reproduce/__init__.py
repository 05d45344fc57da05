"""The paper's tables on a model and data of one's own: every method trained on the same examples, and evaluated."""

from .cell import CellResult
from .matrix import TABLES, Cell, Findings, cells
from .run import Reproduction

__all__ = ["TABLES", "Cell", "CellResult", "Findings", "Reproduction", "cells"]
