"""How an adapter is loaded, said in the README that PEFT writes beside it."""

from __future__ import annotations

import re
from pathlib import Path

# What PEFT's template has where an adapter should tell how to use it.
_UNTOLD = re.compile(r"(## How to Get Started with the Model\n+).*?\[More Information Needed\]", re.DOTALL)


def loading_code(method: str, path: str = "path/or/name/of/this/adapter") -> str:
    """
    Python that loads an adapter onto its base model.

    Args:
        method: the name under which PEFT knows the method, such as "UNIATTN".
        path: where the adapter is.
    """
    return f"""import peft_uniattn  # registers {method} with PEFT; without it loading ends in KeyError: '{method}'
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{path}")"""


def tell_how_to_load(folder: Path, method: str) -> None:
    """
    Fill in what PEFT's README leaves open; any other README stays as it is.

    Args:
        folder: of the adapter; PEFT puts the README there, or one above if the adapter has a name.
        method: see [`loading_code`].
    """
    for readme in (folder / "README.md", folder.parent / "README.md"):
        if not readme.is_file():
            continue
        text = readme.read_text(encoding="utf-8")
        told = _UNTOLD.sub(lambda match: f"{match[1]}```python\n{loading_code(method)}\n```", text)
        if told != text:
            readme.write_text(told, encoding="utf-8")
            return
