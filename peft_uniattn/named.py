"""What a user names on a command line: checkpoints and Superblocks, with errors that say which argument is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@contextmanager
def named_checkpoint(argument: str, value: str) -> Iterator[None]:
    """
    Around the loading of a checkpoint: let a failure to find it name the argument, its value and the way out.

    Raises:
        ValueError: in place of the hub library's error about the name, or the missing files.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{argument}={value!r} is no checkpoint that can be read ({_first_line(error)}); give a folder with a "
            "config.json, or a name that the Hub knows (where the Hub is out of reach, run `hf download NAME "
            "--local-dir FOLDER` on a connected machine and copy FOLDER here)"
        ) from error


def load_named_tokenizer(argument: str, value: str, **options: object) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Args:
        argument: what the user names the checkpoint by.
        value: folder or Hub name.
        **options: of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: if there is no checkpoint, or none of a tokenizer's files in it. For some architectures, such as
            Qwen2, transformers makes an empty tokenizer then, to which every text has no tokens.
    """
    without = f"{argument}={value!r} has no tokenizer; copy its base's tokenizer.json and tokenizer_config.json there"
    with named_checkpoint(argument, value):
        try:
            tokenizer = AutoTokenizer.from_pretrained(value, **options)
            empty = not tokenizer("a", add_special_tokens=False)["input_ids"]
        except HFValidationError:
            raise
        except ValueError as error:
            raise ValueError(f"{without} ({_first_line(error)})") from error
    if empty:
        raise ValueError(without)
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".: ")


# Far more than any model has, and few enough to be listed.
_MOST_LAYERS = 10_000


def parse_superblocks(text: str) -> list[list[int]]:
    """
    Superblocks from a text such as "16-19,20-23" (first and last layer of each, counted from 0).

    Raises:
        ValueError: if it is not of that form, or if a range has fewer than two layers or more than any model.
    """
    blocks = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.strip().isdigit() and last.strip().isdigit()):
            raise ValueError(
                f"superblocks={text!r} must look like '16-19,20-23', first and last layer of each; "
                f"{part!r} is not a range"
            )
        if int(last) <= int(first):
            raise ValueError(
                f"superblocks={text!r}: {part!r} has no follower; it needs 2 layers or more, lowest first"
            )
        if int(last) >= _MOST_LAYERS:
            raise ValueError(
                f"superblocks={text!r}: {part!r} names layer {int(last)}, and no model has more than {_MOST_LAYERS:,} "
                "layers; give first and last layer of each, such as '16-19,20-23'"
            )
        blocks.append(list(range(int(first), int(last) + 1)))
    return blocks


def as_flag(value: Any) -> str:
    """A value of a YAML file as a flag says it: lists with commas, and lists of successive layers as ranges."""
    if not isinstance(value, list):
        return str(value)
    return ",".join(f"{part[0]}-{part[-1]}" if _is_range(part) else str(part) for part in value)


def _is_range(part: Any) -> bool:
    if not (isinstance(part, list) and part and isinstance(part[0], int)):
        return False
    return part == list(range(part[0], part[0] + len(part)))
