"""What the engine generates is what transformers generates: the same tokens, the same log-probabilities."""

import pytest

pytest.importorskip("vllm")

from engine import (
    FAMILIES,
    PAGE,
    assert_equals,
    base_model,
    engine,
    generate,
    sampling,
    standalone_model,
    token_ids,
)

MIXED = (1, 5, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 4, 170)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A standalone model and its folder."""
    model, folder = standalone_model(), tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_what_transformers_generates(family, tmp_path):
    model = standalone_model(family)
    model.save_pretrained(tmp_path)
    with engine(tmp_path, num_gpu_blocks_override=128) as llm:
        assert_equals(generate(llm, token_ids(*MIXED), sampling(40)), model)
        sampled = generate(llm, token_ids(7, 90, seed=3), sampling(40, temperature=1.0, seed=0))
        assert_equals(sampled, model, greedy=False)


@pytest.mark.parametrize(
    "uniattn",
    [
        {"compensation": "none"},
        {"r": 4},
        {"superblocks": [[0, 1, 2, 3, 4, 5, 6, 7]]},  # 7 followers: the last has a page to itself
        {"superblocks": [[3, 4]]},
        {"superblocks": [[0, 1], [2, 3], [4, 5]]},
    ],
    ids=str,
)
def test_every_plan_and_compensation_generates_what_transformers_generates(uniattn, tmp_path):
    model = standalone_model(**uniattn)
    model.save_pretrained(tmp_path)
    with engine(tmp_path, num_gpu_blocks_override=64) as llm:
        assert_equals(generate(llm, token_ids(3, 70), sampling(40)), model)


def test_a_repeated_prefix_is_taken_from_the_cache_and_changes_nothing(llama):
    model, folder = llama
    (prefix,) = token_ids(3 * PAGE)
    prompts = [prefix + rest for rest in token_ids(5, 40, seed=4)]
    with engine(folder, num_gpu_blocks_override=64, enable_prefix_caching=True) as llm:
        generate(llm, prompts[:1], sampling(8))
        again = generate(llm, prompts, sampling(40))
    assert [output.num_cached_tokens for output in again] == [3 * PAGE, 3 * PAGE]
    assert_equals(again, model)


def test_prompts_longer_than_a_step_are_read_in_chunks(llama):
    model, folder = llama
    with engine(folder, num_gpu_blocks_override=64, max_num_batched_tokens=48, enable_chunked_prefill=True) as llm:
        assert_equals(generate(llm, token_ids(170, 3, 111), sampling(40)), model)


def test_preempted_requests_are_recomputed_exactly(llama):
    model, folder = llama
    with engine(folder, num_gpu_blocks_override=16, max_model_len=256, enable_prefix_caching=False) as llm:
        outputs = generate(llm, token_ids(*[30] * 6), sampling(120))
        preemptions = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    assert preemptions > 0
    assert_equals(outputs, model)


@pytest.mark.parametrize("family", ["mistral with a window", "gemma2"])
def test_windows_bear_chunks_caching_and_preemption_at_once(family, tmp_path):
    model = standalone_model(family)
    model.save_pretrained(tmp_path)
    (prefix,) = token_ids(2 * PAGE + 5, seed=11)
    prompts = [prefix + rest for rest in token_ids(1, 20, 40, 60, 30, 90, seed=12)]
    few = {"num_gpu_blocks_override": 18, "max_model_len": 256, "max_num_batched_tokens": 48}
    with engine(tmp_path, enable_prefix_caching=True, **few) as llm:
        for _ in range(2):
            assert_equals(generate(llm, prompts, sampling(90, temperature=1.0)), model, greedy=False)


def test_several_samples_of_one_prompt_share_its_pages_and_stay_apart(llama):
    model, folder = llama
    with engine(folder, num_gpu_blocks_override=64) as llm:
        (output,) = generate(llm, token_ids(50), sampling(60, n=4, temperature=1.0, seed=5))
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
    assert_equals([output], model, greedy=False)


def test_long_generations_cross_many_pages(llama):
    model, folder = llama
    with engine(folder, num_gpu_blocks_override=64) as llm:
        assert_equals(generate(llm, token_ids(2, 60), sampling(420)), model)


def test_the_compiled_forward_generates_the_same(llama, tmp_path, monkeypatch):
    model, folder = llama
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with engine(folder, num_gpu_blocks_override=64, enforce_eager=False) as llm:
        assert_equals(generate(llm, token_ids(*MIXED), sampling(40)), model)


def test_the_base_model_generates_what_transformers_generates(tmp_path):
    model = base_model()  # that a failure above is ours, not the harness's
    model.save_pretrained(tmp_path)
    with engine(tmp_path, num_gpu_blocks_override=64) as llm:
        assert_equals(generate(llm, token_ids(*MIXED), sampling(40)), model)
