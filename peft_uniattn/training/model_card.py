"""Model cards with the plan, the training and the measured figures."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .receipt import Receipt

_CITATION = """@misc{xiong2025uniattn,
  title={UniAttn: Reducing Inference Costs via Softmax Unification for Post-Training LLMs},
  author={Yizhe Xiong and Wei Huang and Xin Ye and Hui Chen and Zijia Lin and Haoran Lian and Zhenpeng Su and Jungong Han and Guiguang Ding},
  year={2025}, eprint={2502.00439}, archivePrefix={arXiv}, primaryClass={cs.CL}
}"""  # noqa: E501


def adapter_card(receipt: Receipt, details: dict[str, Any]) -> ModelCard:
    """The card of the adapter that stage 1 trained."""
    load = """import peft_uniattn  # registers UNIATTN with PEFT; without it loading ends in KeyError: 'UNIATTN'
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/or/name/of/this/adapter")"""
    intro = "A UniAttn adapter: the compensation W_c of the followers, to be loaded onto its base model."
    return _card("UniAttn adapter", intro, load, "peft", receipt, details)


def standalone_card(receipt: Receipt, details: dict[str, Any]) -> ModelCard:
    """The card of the standalone model that stage 2 trained."""
    load = """import peft_uniattn  # or pass trust_remote_code=True where peft_uniattn is not installed
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/or/name/of/this/model")"""
    intro = "A language model whose followers reuse their leader's softmax and cache values only."
    return _card("UniAttn model", intro, load, "transformers", receipt, details)


def _card(title: str, intro: str, load: str, library: str, receipt: Receipt, details: dict[str, Any]) -> ModelCard:
    data = ModelCardData(library_name=library, tags=["uniattn", "kv-cache"], pipeline_tag="text-generation")
    environment = ", ".join(f"{name} {version}" for name, version in receipt.environment.items())
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in receipt.rows())
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {title}: {receipt.base_model}

{intro} The lowest layer of a Superblock computes softmax(QKᵀ); the layers above it reuse that softmax with their own
values, store no keys, and add a linear compensation ([UniAttn](https://arxiv.org/abs/2502.00439)).

```python
{load}
```

## Measured

| | |
|---|---|
{table}

Losses are nats per completion token on held-out data. Measured with {environment}.

The base model's licence applies to this model as well.

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


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", "<br>")
