"""
Put an adapter, or the standalone model made of it, on the Hub.

    hf auth login
    python examples/push_to_hub.py ADAPTER me/my-adapter
    python examples/push_to_hub.py ADAPTER me/my-model --standalone

`peft-uniattn train --push_to_hub` does both at the end of a run, with model cards that hold its figures.
"""

from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import peft_uniattn


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub name of a UniAttn adapter.")],
    repository: Annotated[str, typer.Argument(help="Where it goes, such as me/my-adapter.")],
    standalone: Annotated[bool, typer.Option("--standalone", help="Push a model that needs no base.")] = False,
    private: bool = False,
) -> None:
    """Load, convert if asked to, and upload."""
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    base = model.active_peft_config.base_model_name_or_path
    with TemporaryDirectory() as folder:
        if standalone:
            peft_uniattn.to_standalone(model).save_pretrained(folder)
            AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        else:  # an adapter is used with its base's tokenizer
            model.save_pretrained(folder)
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    print(f"pushed: {repository}")


if __name__ == "__main__":
    typer.run(main)
