"""What is not served is refused in one sentence, before any process or weight."""

import importlib
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

import vllm
from engine import engine, standalone_model

from peft_uniattn.serving import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    standalone_model().save_pretrained(folder)
    return folder


def start(folder, **settings) -> None:
    with engine(folder, **settings):
        pass


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "with pipeline_parallel_size > 1"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "with speculative decoding"),
        ({"kv_cache_dtype": "fp8"}, "with kv_cache_dtype='fp8'"),
        (
            {"tensor_parallel_size": 4, "distributed_executor_backend": "mp"},
            "with tensor_parallel_size=4 and 2 key-value",
        ),
    ],
    ids=str,
)
def test_untested_engine_settings_are_refused(settings, sentence, folder):
    with pytest.raises(ValueError, match=f"UniAttn checkpoints are not served {sentence}"):
        start(folder, **settings)


def test_more_workers_than_divide_a_low_rank_are_refused(tmp_path):
    standalone_model(r=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 and compensation_rank=3"):
        start(tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp")


def test_other_places_of_compensation_are_refused(tmp_path):
    standalone_model(compensation="heads").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compensation='heads' is not served"):
        start(tmp_path)


def test_the_engine_s_own_port_of_transformers_models_is_no_way_around(folder):
    # It would run this package's model on attention that knows nothing of followers.
    with pytest.raises(Exception, match="UniAttn"):
        start(folder, model_impl="transformers", trust_remote_code=True)


def test_other_versions_are_refused(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(ImportError, match=r"this is vLLM 0\.99\.0; install vllm==0\.32"):
        importlib.reload(models)


def test_the_package_imports_no_engine_by_itself():
    program = "import sys, peft_uniattn.serving; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
