"""Disks that are full or closed, numbers that are none, batches with nothing in them: a sentence, and nothing lost."""

from __future__ import annotations

import errno
import os
import resource
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipe_runs
import torch
from conftest import aligned, changed, logits, loud, prompt, tiny_adapter, tiny_model, weights
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState
from trl import SFTTrainer

from peft_uniattn import calibrate, choose_superblocks, to_standalone
from peft_uniattn.calibration import streams
from peft_uniattn.disk import write_failure
from peft_uniattn.training.divergence import StopsAtDivergence
from peft_uniattn.training.main import main

BLOCKS = [[1, 2, 3], [4, 5]]
both_back_ends = pytest.mark.parametrize("back_end", ["eager", "sdpa"])
both_methods = pytest.mark.parametrize("method", ["ridge", "pseudoinverse"])
both_forms = pytest.mark.parametrize("convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"])


def build(back_end="sdpa", dtype=torch.float64, **config):
    model = tiny_model(attn_implementation=back_end, dtype=dtype)
    return loud(tiny_adapter(model, superblocks=BLOCKS, **config))


def compensations(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(model).items() if "uniattn_" in name}


def quiet_calibration(model, data, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ tokens are few")
        return calibrate(model, data, progress=False, **options)


def text(batch=4, length=9, seed=2) -> dict[str, torch.Tensor]:
    ids = prompt(batch, length, seed=seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# Disks. A limit on the size of files makes the system itself refuse to write, as it does on a full disk.


@pytest.fixture
def no_room(monkeypatch):
    """Nothing may wait in memory."""
    monkeypatch.setattr(streams, "_room_on", lambda device: 0)


@contextmanager
def files_up_to(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(folder: Path):
    """`folder` closed to this process; the superuser, to whom nothing is closed, becomes nobody meanwhile."""
    chain = [path for path in folder.parents if path.is_dir() and path.owner() == Path.home().owner()]
    modes = {path: path.stat().st_mode for path in (folder, *chain)}
    user = os.geteuid()
    try:
        if user == 0:
            for path in chain:
                path.chmod(path.stat().st_mode | 0o055)
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


def test_the_tools_of_these_tests_close_a_folder_and_limit_files(tmp_path):
    with read_only(tmp_path), pytest.raises(PermissionError):
        (tmp_path / "file").write_text("x")
    with files_up_to(10), pytest.raises(OSError, match="File too large"):
        (tmp_path / "file").write_text("x" * 100)


def test_an_adapter_that_could_not_be_saved_whole_is_refused_and_can_be_saved_again(tmp_path):
    model = build()
    before = weights(model)
    with files_up_to(10_000), pytest.raises(SafetensorError, match="File too large"):
        model.save_pretrained(tmp_path)
    assert not changed(before, weights(model))
    base = tiny_model()
    with pytest.raises((ValueError, OSError, SafetensorError)):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), logits(tiny_model()))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(saved[name.replace(".default", "")], t) for name, t in compensations(model).items())


def test_a_standalone_model_that_could_not_be_saved_whole_is_refused_and_can_be_saved_again(tmp_path):
    model = to_standalone(build())
    with files_up_to(50_000), pytest.raises(SafetensorError, match="File too large"):
        model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError, SafetensorError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(aligned(reloaded)), logits(aligned(model)))


@both_forms
def test_saving_into_a_closed_folder_is_refused_with_its_name(convert, tmp_path):
    model = convert(build())
    before = weights(model)
    with read_only(tmp_path), pytest.raises(OSError, match=tmp_path.name):
        model.save_pretrained(tmp_path / "model")
    assert not changed(before, weights(model))
    assert not list(tmp_path.iterdir())


def test_calibration_on_a_full_disk_names_the_argument_and_leaves_everything_as_it_was(no_room, tmp_path):
    model = build()
    before = weights(model)
    with files_up_to(2000), pytest.raises(OSError, match=rf"spill_directory='{tmp_path}': File too large.*more room"):
        quiet_calibration(model, [text()], spill_directory=tmp_path)
    assert not changed(before, weights(model))
    assert not list(tmp_path.iterdir())


def test_calibration_in_a_closed_folder_names_the_argument_before_it_reads_data(tmp_path):
    def never():
        raise AssertionError("data were read")
        yield

    with (
        read_only(tmp_path),
        pytest.raises(PermissionError, match=rf"spill_directory='{tmp_path}': Permission denied"),
    ):
        quiet_calibration(build(), never(), spill_directory=tmp_path)
    with pytest.raises(FileNotFoundError, match="spill_directory='/no/such/folder'"):
        quiet_calibration(build(), never(), spill_directory="/no/such/folder")


def test_choosing_superblocks_on_a_full_disk_names_the_argument(no_room, tmp_path):
    with files_up_to(2000), pytest.raises(OSError, match=rf"spill_directory='{tmp_path}': File too large"):
        choose_superblocks(tiny_model(), [text()], followers=3, spill_directory=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), errno.EIO),
        (OSError(errno.ENOENT, "No such file"), None),
        (RuntimeError("CUDA error"), None),
        (ValueError("r=0"), None),
    ],
)
def test_failures_to_write_are_told_from_others(error, number):
    found = write_failure(error)
    assert (found and found.errno) == number


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return recipe_runs.write_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_run_in_a_closed_folder_is_refused_before_a_model_is_loaded(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for name in ("run", "new/run"):
        with read_only(tmp_path), pytest.raises(PermissionError, match=f"output_dir='{tmp_path}/{name}'.*choose"):
            main(recipe_runs.flags(inputs, tmp_path / name))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file is not a directory; choose another output_dir"):
        main(recipe_runs.flags(inputs, tmp_path / "file" / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [3_000, 20_000, 100_000])
def test_a_run_whose_disk_was_full_continues_and_ends_as_one_with_room(inputs, tmp_path, size):
    main(recipe_runs.flags(inputs, tmp_path / "whole"))
    argv = recipe_runs.flags(inputs, tmp_path / "run")
    with files_up_to(size), pytest.raises(OSError, match=r"output_dir='.*/run'.*Make room.*continues"):
        main(argv)
    main(argv)
    for stage in ("stage 1", "stage 2"):
        assert recipe_runs.losses(tmp_path / "run", stage) == recipe_runs.losses(tmp_path / "whole", stage)
    for file in ("adapter/adapter_model", "model/model"):
        first, second = (load_file(tmp_path / run / f"{file}.safetensors") for run in ("run", "whole"))
        assert not changed(first, second)


# Numbers.


@both_forms
@both_back_ends
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_leaves_the_other_rows_bit_equal(convert, back_end, spoilt):
    model, ids = convert(build(back_end)), prompt(3)
    expected = logits(model, ids)
    embeddings = model.get_input_embeddings()(ids).detach()
    embeddings[1, 4] = spoilt
    with torch.no_grad():
        found = model(inputs_embeds=embeddings).logits
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1, 4:].isnan().all()


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_training_stops_at_a_gradient_that_is_no_number(norm):
    arguments = SimpleNamespace(fp16=False)
    with pytest.raises(ValueError, match=r"diverged: the gradient's norm at step 7.*smaller learning_rate"):
        StopsAtDivergence().on_log(arguments, TrainerState(global_step=7), TrainerControl(), {"grad_norm": norm})


@pytest.mark.parametrize("logs", [None, {}, {"grad_norm": 3.0}, {"loss": 1.0}])
def test_training_goes_on_otherwise(logs):
    StopsAtDivergence().on_log(SimpleNamespace(fp16=False), TrainerState(), TrainerControl(), logs)


def test_under_float16_an_infinite_gradient_is_a_step_that_is_skipped():
    StopsAtDivergence().on_log(
        SimpleNamespace(fp16=True), TrainerState(), TrainerControl(), {"grad_norm": float("inf")}
    )


def test_a_run_that_diverges_stops_and_keeps_no_checkpoint_of_it(inputs, tmp_path, monkeypatch):
    training_step, seen = SFTTrainer.training_step, []

    def spoilt(self, model, *args, **kwargs):
        loss = training_step(self, model, *args, **kwargs)
        seen.append(loss)
        if len(seen) == 3:
            next(p for p in model.parameters() if p.requires_grad).grad[0] = torch.nan
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", spoilt)
    with pytest.raises(ValueError, match=r"training has diverged: the gradient's norm at step 3 is nan"):
        main(recipe_runs.flags(inputs, tmp_path / "run", save_steps=1))
    assert not (tmp_path / "run" / "adapter").exists()
    files = list((tmp_path / "run" / "checkpoints").rglob("adapter_model.safetensors"))
    assert sorted(file.parent.name for file in files) == ["checkpoint-1", "checkpoint-2"]
    assert all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())


def test_an_overflow_of_float16_in_calibration_is_named_with_the_way_out():
    model = build(dtype=torch.float16)
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.2.mlp.down_proj").weight.fill_(6e4)
    before = weights(model)
    with pytest.raises(ValueError, match=r"not finite in decoder layer 3.*bfloat16 or float32 instead of float16"):
        quiet_calibration(model, [text()])
    assert not changed(before, weights(model))


def test_a_compensation_that_float16_cannot_hold_is_refused_and_not_made_infinite():
    model = build(dtype=torch.float16)
    with torch.no_grad():
        compensation = model.base_model.model.model.layers[2].self_attn.uniattn_W["default"]
        compensation.float().weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"layer 2 exceeds what the base's torch.float16 can hold.*bfloat16"):
        to_standalone(model)


# Batches.


@both_forms
@both_back_ends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_padding_alone_leave_the_others_as_they_are(convert, back_end, dtype):
    model, ids = convert(build(back_end, dtype)), prompt(3)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        expected = model(ids, attention_mask=torch.ones_like(ids)).logits
        nothing = model(ids, attention_mask=torch.zeros_like(ids)).logits
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-2)
    assert found.isfinite().all()
    assert nothing.isfinite().all()


@both_back_ends
def test_a_row_of_padding_alone_has_no_part_in_gradients(back_end):
    model = build(back_end, torch.float32).train()
    ids, mask = prompt(3), torch.ones(3, 9, dtype=torch.long)
    mask[1] = 0
    found = gradients(model, ids, mask)
    expected = gradients(model, ids[[0, 2]], mask[[0, 2]])
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def gradients(model, ids, mask):
    model.zero_grad()
    model(ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@both_methods
@both_back_ends
def test_batches_of_padding_alone_do_not_matter_to_calibration(method, back_end):
    data = [text(seed=5), text(seed=6)]
    nothing = {"input_ids": prompt(), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}
    with_it, without = build(back_end), build(back_end)
    reports = [
        quiet_calibration(with_it, [nothing, data[0], nothing, data[1]], method=method),
        quiet_calibration(without, data, method=method),
    ]
    assert reports[0].tokens == reports[1].tokens
    for name, tensor in compensations(with_it).items():
        torch.testing.assert_close(tensor, compensations(without)[name], rtol=1e-9, atol=1e-11)


@both_forms
@both_back_ends
def test_sequences_of_one_token_run_and_generate(convert, back_end):
    model, ids = convert(build(back_end)), prompt(3, 1)
    whole = logits(model, torch.cat([ids, ids], dim=1))
    torch.testing.assert_close(logits(model, ids)[:, 0], whole[:, 0], rtol=1e-5, atol=1e-6)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (3, 4)


@both_back_ends
def test_sequences_of_one_token_train(back_end):
    model = build(back_end).train()
    model(prompt(3, 1), use_cache=False).logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


POOR = {
    "one token a sequence": [text(batch=8, length=1)],
    "one token over and over": [{"input_ids": torch.full((4, 9), 7), "attention_mask": torch.ones(4, 9).long()}],
    "one sequence over and over": [{"input_ids": prompt(1).expand(6, 9), "attention_mask": torch.ones(6, 9).long()}]
    * 2,
    "one token in all": [text(batch=1, length=1)],
    "fewer tokens than dimensions": [text(batch=1, length=9)],
}


@both_methods
@pytest.mark.parametrize("r", [None, 3], ids=["full", "low_rank"])
@pytest.mark.parametrize("data", POOR.values(), ids=POOR)
def test_calibration_on_data_without_variety_is_finite_and_no_worse_on_it(method, r, data):
    model = build(r=r)
    report = quiet_calibration(model, data, method=method)
    assert all(tensor.isfinite().all() for tensor in compensations(model).values())
    for follower in report.followers:
        assert follower.after <= follower.before * (1 + 1e-6) + 1e-9
    assert logits(model).isfinite().all()


@both_methods
def test_a_sequence_that_is_there_twice_counts_twice_and_changes_nothing(method):
    once, twice = build(), build()
    quiet_calibration(once, [text()], method=method)
    quiet_calibration(twice, [text(), text()], method=method)
    for name, tensor in compensations(twice).items():
        torch.testing.assert_close(tensor, compensations(once)[name], rtol=1e-8, atol=1e-10)


# Memory.


class Memory:
    """A device that holds so many sequences: a layer's FFN runs out of memory with more."""

    def __init__(self, model: nn.Module, sequences: int, layer: int = 2) -> None:
        self.sequences, self.failures = sequences, 0
        model.get_submodule(f"base_model.model.model.layers.{layer}.mlp").register_forward_pre_hook(self.check)

    def check(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > self.sequences:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(("method", "layer"), [("ridge", 0), ("pseudoinverse", 5)])
def test_calibration_that_runs_out_of_memory_says_so_and_goes_on_with_smaller_batches(method, layer):
    data = [text(5, seed=5), text(4, 7, seed=6), text(1, 8, seed=7)]
    short, ample = build(), build()
    expected = quiet_calibration(ample, data, method=method)
    memory = Memory(short, sequences=2, layer=layer)
    with pytest.warns(UserWarning) as told:
        found = calibrate(short, data, method=method, progress=False)
    messages = [str(warning.message) for warning in told if "out of memory" in str(warning.message)]
    assert memory.failures == 2
    assert [message[:91] for message in messages] == [
        "out of memory with batches of 5 sequences; calibration starts again with 3 at a time. A dat"[:91],
        "out of memory with batches of 3 sequences; calibration starts again with 2 at a time. A dat"[:91],
    ]
    assert (found.batches, found.tokens) == (expected.batches, expected.tokens)
    for name, tensor in compensations(short).items():
        torch.testing.assert_close(tensor, compensations(ample)[name], rtol=1e-7, atol=1e-9)


def test_positions_that_all_sequences_share_stay_when_batches_are_split():
    data = [{**text(5), "position_ids": torch.arange(9)[None]}]
    short, ample = build(), build()
    Memory(short, sequences=2)
    quiet_calibration(ample, data)
    with pytest.warns(UserWarning, match="out of memory"):
        calibrate(short, data, progress=False)
    for name, tensor in compensations(short).items():
        torch.testing.assert_close(tensor, compensations(ample)[name], rtol=1e-7, atol=1e-9)


def test_short_memory_is_left_to_the_layers(tmp_path):
    model, files = build(), []
    Memory(model, sequences=2)
    layer_hook = model.base_model.model.model.layers[5].mlp.register_forward_hook(
        lambda *_: files.append(len(list(tmp_path.rglob("*.pt"))))
    )
    with pytest.warns(UserWarning, match="out of memory"):
        calibrate(model, [text(3)], progress=False, spill_directory=tmp_path)
    layer_hook.remove()
    assert files and min(files) > 0


def test_memory_that_does_not_suffice_for_one_sequence_is_an_error_and_leaves_everything_as_it_was(tmp_path):
    model = build()
    before = weights(model)
    Memory(model, sequences=0)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(torch.OutOfMemoryError, match="one sequence at a time; use shorter sequences"),
    ):
        calibrate(model, [text(3)], progress=False, spill_directory=tmp_path)
    assert not changed(before, weights(model))
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_device_are_not_taken_for_a_lack_of_memory():
    model = build()

    def broken(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    model.get_submodule("base_model.model.model.layers.2.mlp").register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        quiet_calibration(model, [text()])
