"""
Mutation testing of the core files: `python tests/mutants.py --seconds 600 --out mutants.json`, or one TARGET.

Small faults are put into functions one at a time (another comparison, operator, constant or truth value), and the
tests of the file have to notice. Every mutant lives in a fork of a process that has imported everything, so it costs
no more than its tests. A sample by seed, as many as the time allows; survivors are listed with their line.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

ROOT = Path(__file__).parents[1]
# Module -> the tests that have to notice.
TARGETS = {
    "peft_uniattn.plan": ["test_plan.py", "test_refusals.py"],
    "peft_uniattn.layer": ["test_adapter.py", "test_attention.py", "test_compensation_designs.py", "test_refusals.py"],
    "peft_uniattn.tuner.layer": ["test_adapter.py", "test_attention.py", "test_parallel.py", "test_saving.py"],
    "peft_uniattn.cache": ["test_cache.py", "test_cache_kinds.py"],
    "peft_uniattn.calibration.solve": ["test_calibration.py", "test_compensation_designs.py"],
}
LIMIT = 240  # seconds for the tests of one mutant, after which it counts as noticed
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node may become: a name for the change, and the changed copy."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        new.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield f"{type(node.ops[0]).__name__} -> {type(new.ops[0]).__name__}", new
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPERATORS:
        if isinstance(getattr(node, "left", None), (ast.JoinedStr, ast.List)):
            return
        new.op = OPERATORS[type(node.op)]()
        yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", new.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield f"{node.value} -> {node.value + 1}", ast.Constant(node.value + 1)
    elif isinstance(node, (ast.If, ast.IfExp)):
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield "condition negated", new
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "return None", ast.Return(ast.Constant(None))


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)


def mutants(module: ModuleType) -> list[tuple[str, str, int, str, CodeType]]:
    """Function, change, line, source line, and the code of the changed function, of every mutant of a module."""
    source = Path(module.__file__).read_text()
    found = []
    for name, function in functions(module).items():
        first = function.__code__.co_firstlineno
        definition = next(
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef) and first in (node.lineno, *(d.lineno for d in node.decorator_list))
        )
        for node in [node for statement in definition.body for node in ast.walk(statement)]:
            for change, new in changes(node):
                tree = Replace(definition, Replace(node, new).visit(copy_with(definition, node))) if False else None
                del tree
                code = recompiled(source, definition, node, new, function)
                if code is not None:
                    found.append((name, change, node.lineno, source.splitlines()[node.lineno - 1].strip(), code))
    return found
