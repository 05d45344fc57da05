"""An incompatible release of PEFT or transformers gives one sentence on import, and never a wrong number."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import peft_uniattn
from peft_uniattn.seams import SEAMS, check_seams

PACKAGE = Path(peft_uniattn.__file__).parent
EVERY = [
    (module, name, attribute)
    for module, objects in SEAMS.items()
    for name, attributes in objects.items()
    for attribute in (None, *attributes)
]


@pytest.mark.parametrize(("module", "name", "attribute"), EVERY)
def test_a_missing_seam_is_named_with_the_way_out(module, name, attribute, monkeypatch):
    imported = sys.modules[module]
    lacking = type("Lacking", (), {other: None for other in SEAMS[module][name] if other != attribute})
    monkeypatch.setattr(imported, name, None if attribute is None else lacking)
    path = f"{module}.{name}" + (f".{attribute}" if attribute else "")
    with pytest.raises(ImportError) as refusal:
        check_seams()
    package = module.partition(".")[0]
    assert str(refusal.value).startswith(f"{package} ")
    assert f"has no {path}, which peft_uniattn" in str(refusal.value)
    assert "; install " in str(refusal.value)


def test_import_fails_with_the_sentence():
    code = "import peft.tuners.tuners_utils as t; del t.BaseTuner._prepare_adapter_config\nimport peft_uniattn"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: peft ")


def test_every_private_method_of_peft_that_is_called_is_a_seam():
    """Calls of `super()._method` and `BaseTuner._method` in the tuners."""
    called = {
        node.attr
        for file in (*PACKAGE.glob("tuner/*.py"), PACKAGE / "layer.py", PACKAGE / "model.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and (
            (isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super")
            or getattr(node.value, "id", "") in ("BaseTuner", "BaseTunerLayer")
        )
    }
    named = {attribute for attributes in SEAMS["peft.tuners.tuners_utils"].values() for attribute in attributes}
    assert called
    assert called <= named, called - named
