"""`peft-uniattn bench ttft | decode | memory`: what is measured, what is printed, what is refused."""

from __future__ import annotations

import json
import warnings
from functools import partial
from itertools import groupby

import pytest
import torch
from recipe_runs import write_inputs
from transformers import AutoTokenizer
from typer.testing import CliRunner

from peft_uniattn.bench import contenders
from peft_uniattn.bench.contenders import Contender, Models, medians
from peft_uniattn.bench.decode import DecodeBenchmark, random_cache, shared_cache, without_masks
from peft_uniattn.bench.memory import MemoryBenchmark
from peft_uniattn.bench.simulated import _draw
from peft_uniattn.bench.train import TrainBenchmark
from peft_uniattn.bench.ttft import TtftBenchmark, ratios
from peft_uniattn.bench.work import work
from peft_uniattn.cli import app
from peft_uniattn.cli.bench import report
from peft_uniattn.cli.bench.report import print_contenders

TINY = Models(shape="tiny", dtype="float32", device="cpu", rank=4)


def document(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["ttft", "--length", "16", "--rounds", "2"], ["base sdpa", "base eager", "unified sdpa", "unified eager"]),
        (
            ["ttft", "--length", "16", "--chunk", "6", "--rounds", "2"],
            ["base sdpa", "base eager", "unified sdpa", "unified eager"],
        ),
        (["decode", "--batch-size", "2", "--length", "64", "--rounds", "2"], ["base sdpa", "unified sdpa"]),
    ],
)
def test_the_last_line_is_json_with_every_contender_timed(arguments, names, tmp_path):
    output = tmp_path / "result.json"
    options = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--output", str(output)]
    result = document(*arguments, *options)
    assert json.loads(output.read_text()) == result
    (row,) = result.get("lengths", result.get("shapes"))
    assert list(row["contenders"]) == names
    for contender in row["contenders"].values():
        assert contender["median_ms"] > 0
        assert contender["gb_per_s"] > 0
        assert contender["relative_error"] < 1e-3
    assert row["ratios"]["fastest_base"].startswith("base")
    assert row["bound_ms"]["unified"] < row["bound_ms"]["base"]


def test_the_cache_of_llama_3_1_8b_is_measured():
    result = document("memory", "--shape", "llama-3.1-8b", "--device", "cpu", "--length", "64")
    assert result["contenders"]["base"]["cache_bytes_per_token"] == 131_072
    assert result["contenders"]["unified"]["cache_bytes_per_token"] == 106_496
    assert result["ratio"] == 0.8125


def test_a_prompt_in_chunks_gives_the_logits_of_the_whole_and_reads_the_weights_again():
    base, unified = TINY.build()
    ids = torch.arange(16)[None]
    whole, chunked = TtftBenchmark(TINY, (16,)), TtftBenchmark(TINY, (16,), chunk=6)
    for model in (base, unified):
        lengths = []
        hook = model.register_forward_pre_hook(lambda _, args, lengths=lengths: lengths.append(args[0].shape[1]))
        expected, actual = (one._forward(model, ids, "sdpa")() for one in (whole, chunked))
        hook.remove()
        assert lengths == [16, 6, 6, 4]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        once, thrice = whole._work(model, 16), chunked._work(model, 16)
        assert thrice.bytes > 2.9 * (once.bytes - once.state_bytes)
        assert thrice.state_bytes == once.state_bytes
        head = model.get_output_embeddings().weight.numel()
        assert thrice.flops == once.flops + 2 * 2 * head  # logits of the end of every chunk


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint with a tokenizer, and a text of which every word is a token."""
    model = write_inputs(tmp_path)["model_name_or_path"]
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{number % 10}" for number in range(40)))
    return model, text


def test_prompts_come_from_a_text_and_compensation_leaves_a_checkpoint_alone(checkpoint):
    model, text = checkpoint
    models = Models(model=str(model), superblock_size=3, dtype="float32", device="cpu")
    benchmark = TtftBenchmark(models, (8,), batch_size=2, text=str(text))
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    pieces = [words[first : first + 8] for first in range(0, len(words), 8)]
    prompts = benchmark._from_text(8).tolist()
    assert all(prompt in pieces for prompt in prompts)
    assert len(prompts) == 2
    _, unified = models.build()
    assert all(not weight.any() for name, weight in unified.named_parameters() if "compensation" in name)
    arguments = ["--model", str(model), "--text", str(text), "--length", "8", "--device", "cpu", "--dtype", "float32"]
    result = document("ttft", *arguments, "--superblock-size", "3", "--rounds", "1")
    assert result["settings"]["text"] == str(text)


def test_a_text_that_is_too_short_is_refused(checkpoint):
    model, text = checkpoint
    models = Models(model=str(model), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="holds 2 prompts of 20 tokens, and 3 are needed"):
        TtftBenchmark(models, (20,), batch_size=3, text=str(text)).run()


@pytest.mark.parametrize("ratio, last", [(1, [5, 6, 7]), (2, [3, 5, 7])])
def test_a_drawn_share_of_tiles_is_on_and_below_the_diagonal(ratio, last):
    shape, device = torch.Size((1, 2, 3, 8)), torch.device("cpu")
    kept, count = _draw(shape, 0.0, ratio, device, 0)
    assert (count == 1).all()
    assert kept[..., 0].tolist() == [[last, last]]
    kept, count = _draw(shape, 1.0, ratio, device, 0)
    assert count.tolist() == [[[one + 1 for one in last]] * 2]
    assert kept[0, 0, 0, : last[0] + 1].tolist() == list(range(last[0] + 1))


@pytest.mark.gpu
def test_the_allocator_sees_what_is_counted():
    rows = MemoryBenchmark(Models(shape="llama-3.1-8b", device="cuda")).run()["contenders"]
    assert rows["base"]["allocated_bytes_per_token"] == 131_072
    assert rows["unified"]["allocated_bytes_per_token"] == 106_496


def test_a_wrong_result_gets_no_time(monkeypatch):
    forward = TtftBenchmark._forward

    def wrong(self, model, ids, back_end, **kernels):
        run = forward(self, model, ids, back_end, **kernels)
        broken = hasattr(model.config, "superblocks") and back_end == "eager"
        return (lambda: run() + 1e3) if broken else run

    monkeypatch.setattr(TtftBenchmark, "_forward", wrong)
    (row,) = TtftBenchmark(TINY, (16,), rounds=1).run()["lengths"]
    assert "median_ms" not in row["contenders"]["unified eager"]
    assert row["contenders"]["unified eager"]["relative_error"] > 1
    assert "unified eager" not in row["ratios"]
    assert "median_ms" in row["contenders"]["unified sdpa"]


def test_what_does_not_run_says_why():
    def fail():
        raise RuntimeError("no such kernel\nmore")

    contender = Contender("base cudnn", fail)
    assert not contender.check({}, 1.0)
    assert contender.error == "RuntimeError: no such kernel"


# Of torch 2.11 on a GPU, where only the memory-efficient kernel is allowed and heads are grouped.
REFUSALS = (
    "Memory efficient kernel not used because: (Triggered internally at sdp_utils.cpp:986.)",
    "For dense input, both fused kernels require query, key and value to have the same num_heads. Query.sizes(): "
    "[4, 9, 4096, 64], Key sizes(): [4, 3, 4096, 64], Value sizes(): [4, 3, 4096, 64] instead.",
    "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:988.)",
    "Flash attention has been runtime disabled. (Triggered internally at sdp_utils_cpp.h:540.)",
    "cuDNN attention kernel not used because: (Triggered internally at sdp_utils.cpp:990.)",
    "cuDNN attention has been runtime disabled. (Triggered internally at sdp_utils.cpp:706.)",
)


def test_only_warnings_of_kernels_that_cannot_run_are_silenced():
    def refuse():
        for refusal in REFUSALS:
            warnings.warn(refusal, UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    with pytest.warns(UserWarning) as seen:
        Contender("base sdpa efficient", refuse).check({}, 1.0)
    assert [str(warning.message) for warning in seen] == ["something else"]


def test_decode_sees_all_of_the_cache_whatever_its_position():
    base, unified = TINY.build()
    cache = random_cache(base, 2, 32, seed=0)
    token = torch.tensor([[3], [4]])
    with torch.no_grad(), without_masks():
        before = base(token, past_key_values=cache).logits
        cache.layers[0].keys[:, :, 20:] += 1
        for layer in cache.layers:
            layer.cumulative_length.fill_(0)
        assert not torch.equal(before, base(token, past_key_values=cache).logits)
    shared = shared_cache(unified, cache)
    assert shared.layers[5].keys.data_ptr() == cache.layers[5].values.data_ptr()
    assert shared.layers[4].keys.data_ptr() == cache.layers[4].keys.data_ptr()
    assert shared.layers[5].values.shape[-1] == 0


def test_base_and_unified_share_weights_and_the_base_is_untouched():
    base, unified = TINY.build()
    assert type(base).__name__ == "LlamaForCausalLM"
    assert unified.config.superblocks == [[4, 5, 6, 7]]
    assert base.model.layers[5].mlp.up_proj.weight.data_ptr() == unified.model.layers[5].mlp.up_proj.weight.data_ptr()
    assert not hasattr(base.model.layers[5].self_attn, "uniattn_leader")


def test_work_is_counted_from_the_shape():
    base, unified = TINY.build()
    # hidden 64, MLP 128, 8 layers, 4 query and 2 key/value heads of 16, vocabulary 256
    linear = 8 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    one = work(base, 1, 1, 100)
    assert one.flops == 2 * (linear + 64 * 256) + 16 * 2 * 100 * 64
    assert one.bytes == 4 * (linear + 64 * 256 + 16 * 2 * 16 * 100)
    assert one.bounds_ms(1e6, 1e9) == {"flops": one.flops / 1e3, "bytes": one.bytes / 1e6}
    assert one.bound_ms(1e6, 1e9) == one.flops / 1e3
    followers = work(unified, 1, 1, 100)
    assert one.bytes - followers.bytes == 4 * (3 * (64 * 64 + 64 * 32) - 3 * 2 * 4 * 64 + 3 * 2 * 16 * 100)


def test_ratios_are_to_the_fastest_base():
    rows = {"base a": {"median_ms": 4.0}, "base b": {"median_ms": 2.0}, "unified a": {"median_ms": 1.0}, "base c": {}}
    assert ratios(rows) == {"fastest_base": "base b", "unified a": 0.5}


def test_contenders_take_turns_in_changing_order():
    seen = []
    times = medians({name: lambda name=name: seen.append(name) for name in "abc"}, torch.device("cpu"), 8)
    rounds = ["".join(seen[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 2
    assert times.keys() == {"a", "b", "c"}


def test_contenders_run_for_a_while_before_their_turn(monkeypatch):
    now, seen = [0.0], []

    def run(name):
        seen.append(name)
        now[0] += 1.0

    monkeypatch.setattr(contenders, "perf_counter", lambda: now[0])
    medians({name: partial(run, name) for name in "ab"}, torch.device("cpu"), 1, load=2.5)
    assert ["".join(group) for _, group in groupby(seen)] in (["aaaa", "bbbb"], ["bbbb", "aaaa"])


def test_every_contender_shows_what_it_achieved_and_took(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    timed = {"median_ms": 12.5, "tflop_per_s": 20.4, "gb_per_s": 2131.0, "peak_memory_bytes": 31 * 2**30}
    contenders = {
        "base sdpa cudnn": {**timed, "relative_error": 0.0},
        "unified sdpa cudnn": {**timed, "median_ms": 10.0, "relative_error": 0.025},
        "unified sdpa flash": {"relative_error": "RuntimeError: no such kernel", "peak_memory_bytes": None},
    }
    row = {
        "contenders": contenders,
        "work": {"base": {"bytes": 24e9, "flops": 3e11}},
        "bounds_ms": {"base": {"bytes": 8.0, "flops": 0.4}},
        "ratios": {"unified sdpa cudnn": 0.8},
    }
    print_contenders(row, "16 x 8,192 tokens")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "16 x 8,192 tokens, bounds of base: 24 GB in 8.00 ms, 0.3 TFLOP in 0.40 ms"
    lines = [line.replace("│", " ").split() for line in printed]
    assert ["base", "sdpa", "cudnn", "12.50", "20.4", "2131", "31.0", "0.0e+00"] in lines
    assert ["unified", "sdpa", "cudnn", "10.00", "0.800", "20.4", "2131", "31.0", "2.5e-02"] in lines
    assert ["unified", "sdpa", "flash", "no", "time", "RuntimeError:", "no", "such", "kernel"] in lines


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Models(dtype="int8"), "dtype='int8' is not measured; use one of"),
        (lambda: Models(device="cpu", back_ends=("sdpa cudnn",)), "are not on this machine; choose from eager, sdpa"),
        (lambda: TtftBenchmark(TINY, (1,)), "must name prompts of 2 tokens or more"),
        (lambda: TtftBenchmark(TINY, (8,), chunk=1), "chunk=1 must be 2 tokens or more, or None"),
        (lambda: TtftBenchmark(TINY, (8,), kept=0.0), "kept=0.0 must be a share of the tiles"),
        (lambda: TtftBenchmark(TINY, (8,), text="novel.txt"), "text='novel.txt' .* give its folder or name as model"),
        (lambda: TtftBenchmark(TINY, (8,), tiles_gib=-1.0), "tiles_gib=-1.0 must be a number of GiB"),
        (lambda: DecodeBenchmark(TINY, ((1, 8),)), "must be of 1 sequence and 352 tokens or more"),
        (lambda: MemoryBenchmark(TINY, 0), "length=0 must be 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_command_line_reports_errors_in_one_sentence():
    result = CliRunner().invoke(app, ["bench", "ttft", "--shape", "huge", "--device", "cpu"])
    assert result.exit_code == 1
    assert "shape='huge' is not known" in result.output


def test_the_times_so_far_are_saved_after_every_length():
    saved = []
    TtftBenchmark(TINY, (16, 32), rounds=1).run(lambda result: saved.append(json.loads(json.dumps(result))["lengths"]))
    assert [[row["length"] for row in lengths] for lengths in saved] == [[16], [16, 32]]


@pytest.mark.parametrize("command", ["ttft", "decode", "memory", "train"])
@pytest.mark.parametrize(
    ("output", "message"), [("folder", "output='folder' is a folder"), ("file/a.json", "output='file/a.json': ")]
)
def test_an_output_that_cannot_become_a_file_is_refused_before_a_model_is_built(
    command, output, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for benchmark, method in ((Models, "build"), (TrainBenchmark, "run")):
        monkeypatch.setattr(benchmark, method, lambda self: pytest.fail("measured"))
    result = CliRunner().invoke(app, ["bench", command, "--shape", "tiny", "--device", "cpu", "--output", output])
    assert result.exit_code == 1
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_folder_of_an_output_is_made(tmp_path):
    output = tmp_path / "new" / "folder" / "memory.json"
    result = document("memory", "--shape", "tiny", "--device", "cpu", "--length", "8", "--output", str(output))
    assert json.loads(output.read_text()) == result


def test_the_document_is_printed_though_it_cannot_be_written(tmp_path, capsys, monkeypatch):
    def full(path, text):
        raise OSError("no space left")

    monkeypatch.setattr(report, "write_atomically", full)
    with pytest.raises(OSError, match="no space left"):
        report.finish({"benchmark": "memory"}, tmp_path / "memory.json")
    assert json.loads(capsys.readouterr().out)["benchmark"] == "memory"
