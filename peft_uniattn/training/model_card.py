"""Model cards: what is shared, what was measured, how to load it, on which base and under which licence."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..cards import loading_code
from .receipt import Receipt

_HUB_TIMEOUT = 3.0  # seconds
_CITATION = """@misc{xiong2025uniattn,
  title={UniAttn: Reducing Inference Costs via Softmax Unification for Post-Training LLMs},
  author={Yizhe Xiong and Wei Huang and Xin Ye and Hui Chen and Zijia Lin and Haoran Lian and Zhenpeng Su and Jungong Han and Guiguang Ding},
  year={2025}, eprint={2502.00439}, archivePrefix={arXiv}, primaryClass={cs.CL}
}"""  # noqa: E501

_UNIATTN = (
    "The lowest layer of a Superblock computes softmax(QKᵀ); the layers above it reuse that softmax with their own "
    "values, store no keys, and add a linear compensation ([UniAttn](https://arxiv.org/abs/2502.00439))."
)
_STANDALONE = {
    "uniattn": ("UniAttn", f"A language model whose layers share softmax. {_UNIATTN}"),
    "cla": ("CLA", "A language model whose followers attend over their leader's keys and values, and cache nothing."),
    "llmdrop": ("LLMDrop", "A language model without attention in some of its layers."),
}


@dataclass(frozen=True)
class Base:
    """
    What a card says about the base model.

    Attributes:
        name: its name on the Hub; None if it is a folder.
        licence: as its own card names it, such as "apache-2.0"; None if that is not known.
        link: where the terms are, if they are no well-known licence.
    """

    name: str | None = None
    licence: str | None = None
    link: str | None = None


def find_base(name_or_path: str | None) -> Base:
    """
    Read the licence of a base model from its card: in its folder, or on the Hub, which is asked once and briefly.

    Args:
        name_or_path: a checkpoint's folder or its name on the Hub; None if neither is known.
    """
    if name_or_path is None:
        return Base()
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        readme = folder / "README.md"
        return _base(None, ModelCard(readme.read_text(encoding="utf-8")).data if readme.is_file() else None)
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return Base()
    try:
        return _base(name_or_path, HfApi().model_info(name_or_path, timeout=_HUB_TIMEOUT).card_data)
    except Exception:  # the kinds differ between versions; without an answer the licence is not known
        return Base(name_or_path)


def _base(name: str | None, data: ModelCardData | None) -> Base:
    fields = {} if data is None else data.to_dict()
    return Base(name, fields.get("license_name") or fields.get("license"), fields.get("license_link"))


def adapter_card(receipt: Receipt, details: dict[str, Any], base: Base | None = None) -> ModelCard:
    """The card of the adapter that stage 1 trained."""
    intro = f"A UniAttn adapter: the compensation W_c of the followers, to be loaded onto its base model. {_UNIATTN}"
    return _card("UniAttn adapter", intro, loading_code("UNIATTN"), "peft", receipt, details, base or Base())


def standalone_card(receipt: Receipt, details: dict[str, Any], base: Base | None = None) -> ModelCard:
    """The card of the standalone model that stage 2 trained."""
    load = """import peft_uniattn  # or pass trust_remote_code=True where peft_uniattn is not installed
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/or/name/of/this/model")"""
    title, intro = _STANDALONE[details["plan"].get("method", "uniattn")]
    return _card(f"{title} model", intro, load, "transformers", receipt, details, base or Base())


def _card(
    title: str, intro: str, load: str, library: str, receipt: Receipt, details: dict[str, Any], base: Base
) -> ModelCard:
    data = ModelCardData(
        base_model=base.name,
        base_model_relation=None if base.name is None else "adapter" if library == "peft" else "finetune",
        library_name=library,
        # Terms of their own have names that the Hub does not know as licences.
        license=base.licence if base.link is None else "other",
        license_name=base.licence if base.link is not None else None,
        license_link=base.link,
        pipeline_tag="text-generation",
        tags=["uniattn", "kv-cache"],
    )
    environment = ", ".join(f"{name} {version}" for name, version in receipt.environment.items())
    receipt = replace(receipt, base_model=_public(receipt.base_model), data=_public(receipt.data))
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in receipt.rows())
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {title}: {receipt.base_model}

{intro}

```python
{load}
```

## What is shared

{_shared(receipt, details["plan"].get("rank"))}

## Measured

| | |
|---|---|
{table}

Losses are nats per completion token on held-out data. Measured with {environment}.

## Licence

{_licence(base)}

## How it was made

```json
{json.dumps(details, indent=2)}
```

## Citation

```bibtex
{_CITATION}
```
"""
    )


def _shared(receipt: Receipt, rank: int | None) -> str:
    if not receipt.superblocks:
        return "Nothing; the plan below says which layers go without attention."
    rows = "\n".join(f"| {block[0]} | {', '.join(map(str, block[1:]))} |" for block in receipt.superblocks)
    counted = f"Layers are counted from 0, of {receipt.num_layers}."
    if receipt.adapter_parameters:
        counted += f" W_c of every follower is {'a full matrix' if rank is None else f'of rank {rank}'}."
    return f"| leader | followers |\n|---|---|\n{rows}\n\n{counted}"


def _licence(base: Base) -> str:
    if base.licence is None:
        return "The base model's licence applies to this model as well."
    named = base.licence if base.link is None else f"[{base.licence}]({base.link})"
    return f"The base model's licence applies to this model as well: {named}."


def _public(names: str) -> str:
    """Checkpoints or files, without the folders of a machine that no reader of the card has."""
    return ", ".join(Path(name).name if Path(name).is_absolute() else name for name in names.split(", "))


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", "<br>") or "(nothing)"
