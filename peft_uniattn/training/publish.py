"""Uploading what a run has made."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from tqdm.auto import tqdm

from .arguments import Arguments


def publish(output_dir: Path, arguments: Arguments) -> dict[str, str]:
    """
    Upload adapter and standalone model, each to a repository of its own; what has not changed is not sent again.

    Args:
        output_dir: of a run; what is not there is left out.
        arguments: `hub_model_id` (default: the name of `output_dir`), `hub_adapter_id`, `hub_private_repo`,
            `hub_token`.

    Returns:
        the addresses by folder.
    """
    training, recipe = arguments.training, arguments.recipe
    model_id = training.hub_model_id or output_dir.resolve().name
    repositories = {"adapter": recipe.hub_adapter_id or f"{model_id}-adapter", "model": model_id}
    api = HfApi(token=training.hub_token)
    addresses = {}
    for folder, name in repositories.items():
        if not (output_dir / folder).is_dir():
            continue
        repository = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=output_dir / folder,
            commit_message=f"UniAttn {folder}, trained with peft_uniattn",
        )
        addresses[folder] = str(repository)
        tqdm.write(f"pushed {folder}: {repository}")
    return addresses
