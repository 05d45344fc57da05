"""W_c from data: every follower's against numpy on what hooks see, and what calibration leaves alone."""

import json
import math
import re
import weakref

import numpy as np
import pytest
import torch
from conftest import loud, prompt, tiny_adapter, tiny_model, transformers_adapters
from transformers import BatchEncoding

from peft_uniattn import UniAttnConfig, UniAttnLayer, calibrate, to_standalone
from peft_uniattn.calibration import streams
from peft_uniattn.calibration.solve import TokenStatistics, factorise, solve_pseudoinverse, solve_ridge
from peft_uniattn.calibration.streams import Spill, original_model, unified_model
from peft_uniattn.inspection import find_adapter

# Layer 0 is ordinary below, layer 3 between the Superblocks.
BLOCKS = [[1, 2], [4, 5]]
# Both leaders see everything, all their followers and layer 0 have a window.
LEADERS_FULL = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "sliding")],
}
CASES = [
    ("llama", {}, "sdpa", BLOCKS),
    ("llama", {}, "eager", [[1, 2, 3], [4, 5]]),
    ("llama", {"num_key_value_heads": 4}, "sdpa", [[0, 1, 2]]),
    ("mistral", {"sliding_window": 3}, "sdpa", [[2, 3, 4, 5]]),
    ("mistral", {"sliding_window": 3}, "eager", BLOCKS),
    ("qwen2", {}, "sdpa", BLOCKS),
    ("qwen2", LEADERS_FULL, "sdpa", [[1, 2, 3], [4, 5]]),
]


def case_id(case):
    family, changes, back_end, blocks = case
    return "-".join([family, *changes, back_end, str(blocks)])


def every_case(test):
    """In float64 throughout: eager attention's own float32 makes NaN of the padding of a float64 model."""
    return pytest.mark.usefixtures("float64")(pytest.mark.parametrize("case", CASES, ids=case_id)(test))


both_methods = pytest.mark.parametrize("method", ["ridge", "pseudoinverse"])
both_ranks = pytest.mark.parametrize("rank", [None, 3], ids=["full", "low rank"])


def build(case=CASES[0], rank=None, dtype=torch.float64):
    family, changes, back_end, blocks = case
    model = tiny_model(family, attn_implementation=back_end, dtype=dtype, **changes)
    follower_mask = "leader" if "layer_types" in changes else "own"
    return loud(tiny_adapter(model, superblocks=blocks, r=rank, follower_mask=follower_mask))


def batches(padding="left", widths=(9, 13, 7, 11), size=5):
    """Batches of different widths; every sequence but the first of each is padded, by a different amount."""
    result = []
    for seed, width in enumerate(widths):
        index = torch.arange(width)
        lengths = torch.tensor([width - row for row in range(size)])[:, None]
        mask = {"none": index >= 0, "left": index >= width - lengths, "right": index < lengths}[padding]
        mask = mask.expand(size, width).long()
        ids = prompt(batch=size, length=width, seed=20 + seed)
        result.append({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask})
    return result


def run(model, data=None, method="ridge", **options):
    return calibrate(model, batches() if data is None else data, method, **{"progress": False, **options})


def layer_of(model, index):
    return model.base_model.model.model.layers[index]


def factors_of(model, layer, adapter="default"):
    """The compensation's weights, in the order in which they are applied."""
    attention = layer_of(model, layer).self_attn
    containers = (attention.uniattn_W, attention.uniattn_A, attention.uniattn_B)
    return [container[adapter].weight for container in containers if adapter in container]


def compensation_of(model, layer, adapter="default"):
    """W_c as x·W_c takes it, or A·B, in float64."""
    factors = [weight.detach().double().numpy().T for weight in factors_of(model, layer, adapter)]
    return np.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]


def all_compensations(model, adapter="default"):
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "uniattn_" in name and f".{adapter}." in name
    }


def followers_of(blocks):
    return [layer for block in blocks for layer in block[1:]]


class Activations:
    """
    What calibration of one follower is about, over all tokens that are not padding, in numpy and float64.

    Attributes:
        x: Norm(x) of the unified model, (tokens, hidden size).
        error: ε, the original minus the unified residual stream after attention, without the follower's own W_c.
        original: the original attention output.
        position: how many tokens come before, in the same sequence.
    """

    @torch.no_grad()
    def __init__(self, model, layer, data):
        own = factors_of(model, layer)
        kept = [weight.clone() for weight in own]
        for weight in own:
            weight.zero_()
        rows = [self._of_batch(model, layer_of(model, layer), batch) for batch in data]
        for weight, value in zip(own, kept, strict=True):
            weight.copy_(value)
        self.x, self.error, self.original, self.position = map(np.concatenate, zip(*rows, strict=True))

    @staticmethod
    def _of_batch(model, layer, batch):
        seen = {}

        def attention(_, args, kwargs, output):
            seen["x"], seen["output"] = kwargs["hidden_states"], output[0]

        def after_attention(_, args):
            seen["residual"] = args[0]

        handles = [
            layer.self_attn.register_forward_hook(attention, with_kwargs=True),
            layer.post_attention_layernorm.register_forward_pre_hook(after_attention),
        ]
        with model.disable_adapter():
            model(**batch)
        original = dict(seen)
        model(**batch)
        for handle in handles:
            handle.remove()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        position = torch.cat([torch.arange(int(row.sum())) for row in mask])
        error = original["residual"].double() - seen["residual"].double()
        values = (seen["x"].double(), error, original["output"].double())
        return [value[mask].numpy() for value in values] + [position.numpy()]

    def before(self):
        return np.linalg.norm(self.error) / np.linalg.norm(self.original)

    def after(self, compensation):
        return np.linalg.norm(self.error - self.x @ compensation) / np.linalg.norm(self.original)

    def ridge(self, strength):
        """The minimum of ‖ε − x·W‖² + λ‖W‖², as an ordinary least-squares problem with λ in extra rows."""
        size = self.x.shape[1]
        penalty = math.sqrt(strength * np.square(self.x).sum() / size)
        rows = np.concatenate([self.x, penalty * np.eye(size)])
        return np.linalg.lstsq(rows, np.concatenate([self.error, np.zeros((size, size))]), rcond=None)[0]

    def means(self):
        """Mean x and mean ε of every position."""
        of = [self.position == position for position in range(self.position.max() + 1)]
        return np.stack([self.x[i].mean(0) for i in of]), np.stack([self.error[i].mean(0) for i in of])

    def pseudoinverse(self):
        x, error = self.means()
        return np.linalg.pinv(x, rcond=1e-10) @ error


def assert_close(actual, expected, tolerance=1e-8):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@every_case
@pytest.mark.parametrize("ridge", [1e-2, 1.0, 1e-6])
def test_ridge_compensation_of_every_follower_is_the_least_squares_solution(case, ridge):
    model, data = build(case), batches()
    run(model, data, ridge=ridge)
    for layer in followers_of(case[-1]):
        assert_close(compensation_of(model, layer), Activations(model, layer, data).ridge(ridge))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@both_methods
def test_padding_on_either_side_is_left_out(padding, method):
    model, data = build(), batches(padding)
    report = run(model, data, method)
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in data)
    for layer in followers_of(BLOCKS):
        activations = Activations(model, layer, data)
        expected = activations.ridge(1e-2) if method == "ridge" else activations.pseudoinverse()
        assert_close(compensation_of(model, layer), expected)


@every_case
@pytest.mark.parametrize("widths", [(9, 13, 7, 11), (40, 37)], ids=["fewer positions than coordinates", "more"])
def test_pseudoinverse_compensation_of_every_follower_is_numpys_on_position_means(case, widths):
    model, data = build(case), batches(widths=widths)
    run(model, data, "pseudoinverse")
    for layer in followers_of(case[-1]):
        assert_close(compensation_of(model, layer), Activations(model, layer, data).pseudoinverse(), 1e-7)


@both_methods
def test_without_an_attention_mask_every_token_counts(method):
    data = [{"input_ids": batch["input_ids"]} for batch in batches("none")]
    model = build()
    assert run(model, data, method).tokens == 5 * (9 + 13 + 7 + 11)
    other = build()
    run(other, batches("none"), method)
    for layer in followers_of(BLOCKS):
        assert_close(compensation_of(model, layer), compensation_of(other, layer))


def test_position_ids_of_a_batch_are_those_of_the_model():
    data = batches("none")
    for batch in data:
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).flip(0).expand_as(batch["input_ids"]) * 3
    model, plain = build(), build()
    run(model, data)
    run(plain, batches("none"))
    for layer in followers_of(BLOCKS):
        assert_close(compensation_of(model, layer), Activations(model, layer, data).ridge(1e-2))
        assert not np.allclose(compensation_of(model, layer), compensation_of(plain, layer), rtol=1e-3)


def lowest_error(x, compensation, rank):
    """The least ‖x·(W − A·B)‖ over all A·B of this rank (Eckart and Young)."""
    return np.linalg.norm(np.linalg.svd(x @ compensation, compute_uv=False)[rank:])


@every_case
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_ridge_loses_as_little_as_any_factors_of_that_rank_can(case, rank):
    """With λI as part of the second moment: its root is one more set of rows below the tokens'."""
    model, data = build(case, rank), batches()
    run(model, data)
    for layer in followers_of(case[-1]):
        activations = Activations(model, layer, data)
        full, factors = activations.ridge(1e-2), compensation_of(model, layer)
        size = len(full)
        penalty = math.sqrt(1e-2 * np.square(activations.x).sum() / size)
        rows = np.concatenate([activations.x, penalty * np.eye(size)])
        best = lowest_error(rows, full, rank)
        assert np.linalg.matrix_rank(factors, tol=1e-9 * np.abs(factors).max()) == rank
        assert np.linalg.norm(rows @ (full - factors)) == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_pseudoinverse_loses_as_little_as_any_factors_of_that_rank_can(rank):
    model, data = build(rank=rank), batches()
    run(model, data, "pseudoinverse")
    for layer in followers_of(BLOCKS):
        activations = Activations(model, layer, data)
        full, (means, _) = activations.pseudoinverse(), activations.means()
        lost = np.linalg.norm(means @ (full - compensation_of(model, layer)))
        assert lost == pytest.approx(lowest_error(means, full, rank), rel=1e-7)


def test_factors_lose_less_of_the_output_than_a_truncated_svd_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.logspace(0, 2, 12, dtype=torch.float64)
    matrix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix)
    for rank in range(1, 12):
        a, b = factorise(matrix, x.T @ x, rank)
        assert a.shape == (12, rank) and b.shape == (rank, 12)
        lost = (x @ (matrix - a @ b)).norm().item()
        assert lost == pytest.approx(lowest_error(x.numpy(), matrix.numpy(), rank), rel=1e-9)
        truncated = u[:, :rank] * s[:rank] @ vh[:rank]
        assert lost < 0.9 * (x @ (matrix - truncated)).norm().item()


def test_factors_of_full_rank_are_the_matrix():
    generator = torch.Generator().manual_seed(0)
    matrix, x = (torch.randn(12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = factorise(matrix, x.T @ x, 12)
    torch.testing.assert_close(a @ b, matrix, rtol=1e-10, atol=1e-10)


def test_factors_have_equal_norms():
    generator = torch.Generator().manual_seed(0)
    matrix, x = (torch.randn(12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = factorise(matrix, x.T @ x, 3)
    assert a.norm().item() == pytest.approx(b.norm().item(), rel=1e-12)


@both_ranks
@both_methods
def test_the_report_gives_the_errors_before_and_after(method, rank):
    model, data = build(rank=rank), batches()
    report = run(model, data, method)
    assert [(error.layer, error.leader) for error in report.followers] == [(2, 1), (5, 4)]
    for error in report.followers:
        activations = Activations(model, error.layer, data)
        assert error.before == pytest.approx(activations.before(), rel=1e-9)
        assert error.after == pytest.approx(activations.after(compensation_of(model, error.layer)), rel=1e-9)


@pytest.mark.parametrize(("method", "ridge"), [("ridge", 0.5), ("pseudoinverse", None)])
@both_ranks
def test_the_report_says_how_it_was_made(method, ridge, rank):
    report = run(build(rank=rank), method=method, ridge=0.5)
    assert (report.method, report.ridge, report.rank, report.batches) == (method, ridge, rank, 4)
    assert report.seconds > 0
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields["followers"][0] == {
        "layer": 2,
        "leader": 1,
        "before": report.followers[0].before,
        "after": report.followers[0].after,
    }
    for error in report.followers:
        assert re.search(rf"{error.layer} +{error.leader} +{error.before:.3f} +{error.after:.3f} ", str(report))


def test_progress_prints_the_report(capsys):
    report = run(build(), progress=True)
    assert str(report) in capsys.readouterr().out


def test_without_progress_nothing_is_printed(capsys):
    run(build())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@every_case
@both_ranks
@pytest.mark.parametrize("ridge", [1e-12, 1e-2, 100.0])
def test_ridge_never_makes_the_error_on_its_data_larger(case, rank, ridge):
    for error in run(build(case, rank), ridge=ridge).followers:
        assert 0 < error.after <= error.before


def test_a_smaller_ridge_leaves_a_smaller_error_in_the_lowest_follower():
    left = [run(build(), ridge=ridge).followers[0].after for ridge in (1.0, 1e-1, 1e-2, 1e-4, 1e-8)]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize(("method", "options"), [("ridge", {"ridge": 1e-13}), ("pseudoinverse", {})])
def test_nothing_is_left_of_errors_that_are_linear_in_the_input(method, options):
    """12 different tokens in 32 dimensions, however often they are repeated, leave nothing that is not linear."""
    data = [{"input_ids": prompt(batch=1, length=12).repeat(4, 1)}] * 3
    for error in run(build(), data, method, **options).followers:
        assert error.before > 0.1
        assert error.after < 1e-5 * error.before


def test_the_calibrated_model_follows_the_original_exactly_where_the_error_is_linear():
    model = build(CASES[2])
    data = [{"input_ids": prompt(batch=1, length=12)}]
    run(model, data, "pseudoinverse")
    with torch.no_grad():
        unified = model(**data[0]).logits
        with model.disable_adapter():
            original = model(**data[0]).logits
    torch.testing.assert_close(unified, original, rtol=0, atol=1e-4)


@both_ranks
@both_methods
def test_where_there_is_no_error_the_compensation_is_zero(method, rank):
    """A sequence of one token has nothing to share: every softmax is 1."""
    model = build(rank=rank)
    for error in run(model, [{"input_ids": prompt(batch=20, length=1)}], method).followers:
        assert error.before == pytest.approx(0, abs=1e-12)
        assert np.abs(compensation_of(model, error.layer)).max() < 1e-12


@pytest.mark.parametrize("padding", ["left", "right"])
@both_methods
def test_what_padding_holds_does_not_matter(padding, method):
    model, other = build(), build()
    data, noise = batches(padding), batches(padding)
    for batch, different in zip(noise, batches("none", size=5), strict=True):
        batch["input_ids"] = torch.where(
            batch["attention_mask"].bool(), batch["input_ids"], different["input_ids"] // 2
        )
    run(model, data, method)
    run(other, noise, method)
    for layer in followers_of(BLOCKS):
        assert_close(compensation_of(other, layer), compensation_of(model, layer))


@both_methods
def test_how_samples_are_grouped_into_batches_does_not_matter(method):
    whole = batches("right", widths=(9, 9))
    rows = [{key: value[[i]] for key, value in batch.items()} for batch in whole for i in range(5)]
    model, other = build(), build()
    run(model, whole, method)
    run(other, rows, method)
    for layer in followers_of(BLOCKS):
        assert_close(compensation_of(other, layer), compensation_of(model, layer))


@both_ranks
def test_what_the_compensation_was_before_does_not_matter(rank):
    model, other = build(rank=rank), build(rank=rank)
    run(model)
    run(other, batches(widths=(8,)))
    run(other)
    for layer in followers_of(BLOCKS):
        assert_close(compensation_of(other, layer), compensation_of(model, layer))


@pytest.mark.usefixtures("float64")
@both_methods
def test_both_back_ends_give_the_same_compensation(method):
    models = [build(("llama", {}, back_end, BLOCKS)) for back_end in ("eager", "sdpa")]
    for model in models:
        run(model, method=method)
    for layer in followers_of(BLOCKS):
        assert_close(*(compensation_of(model, layer) for model in models), 1e-8)


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
def test_a_bfloat16_model_is_calibrated_in_float64_on_its_own_activations(back_end):
    model, data = build(("llama", {}, back_end, BLOCKS), dtype=torch.bfloat16), batches()
    report = run(model, data)
    for error in report.followers:
        weights = factors_of(model, error.layer)
        assert [weight.dtype for weight in weights] == [torch.float32]
        assert_close(compensation_of(model, error.layer), Activations(model, error.layer, data).ridge(1e-2), 1e-6)
        assert error.after < error.before


def test_a_generator_is_read_once_and_in_order():
    drawn = []

    def generator():
        for index, batch in enumerate(batches()):
            drawn.append(index)
            yield batch

    model, other = build(), build()
    assert run(model, generator()).batches == 4
    assert drawn == [0, 1, 2, 3]
    run(other)
    for layer in followers_of(BLOCKS):
        assert np.array_equal(compensation_of(model, layer), compensation_of(other, layer))


def test_max_batches_draws_no_batch_more():
    def two():
        yield from batches()[:2]
        pytest.fail("a third batch was asked for")

    model, other = build(), build()
    assert run(model, two(), max_batches=2).batches == 2
    run(other, batches()[:2])
    for layer in followers_of(BLOCKS):
        assert np.array_equal(compensation_of(model, layer), compensation_of(other, layer))


def test_other_entries_of_a_batch_are_ignored():
    model, other = build(), build()
    run(model, [{**batch, "labels": ["text"], "token_type_ids": None} for batch in batches()])
    run(other)
    for layer in followers_of(BLOCKS):
        assert np.array_equal(compensation_of(model, layer), compensation_of(other, layer))


def test_a_tokenizers_batch_encoding_is_a_batch():
    assert run(build(), [BatchEncoding(batch) for batch in batches()]).batches == 4


def test_hidden_states_without_room_in_memory_are_kept_on_disk_and_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_room_on", lambda device: 0)
    files = []

    def generator():
        for batch in batches():
            files.append(len(list(tmp_path.rglob("*.pt"))))
            yield batch

    run(build(), generator(), spill_directory=tmp_path)
    assert files[0] == 0 and files == sorted(set(files))
    assert not list(tmp_path.iterdir())


@both_ranks
def test_hidden_states_give_the_same_in_memory_on_disk_and_half_and_half(rank, tmp_path, monkeypatch):
    found, most = {}, {}
    # Of 64-bit numbers: the streams of 4 batches alone are more than 10,000 bytes.
    for room in (0, 10_000, 2**20):
        monkeypatch.setattr(streams, "_room_on", lambda device, room=room: room)
        model, files = build(rank=rank), []
        hook = layer_of(model, 5).mlp.register_forward_hook(
            lambda *_, files=files: files.append(len(list(tmp_path.rglob("*.pt"))))
        )
        run(model, spill_directory=tmp_path)
        hook.remove()
        found[room], most[room] = all_compensations(model), max(files)
    assert most[2**20] == 0 < most[10_000] < most[0]
    for compensations in found.values():
        assert all(torch.equal(compensations[name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("room", [0, 2**20])
def test_what_waits_is_not_changed_by_work_in_place(room, tmp_path):
    spill = Spill(tmp_path, room)
    given = {"query": torch.ones(3), "kwargs": {"scaling": 0.5, "sinks": [torch.ones(2)]}}
    spill.put(0, "leader", given)
    given["query"].zero_()
    for _ in range(2):
        taken = spill.get(0, "leader")
        assert torch.equal(taken["query"].zero_() + 1, torch.ones(3))
        assert torch.equal(taken["kwargs"]["sinks"][0].add_(1), torch.full((2,), 2.0))
        assert taken["kwargs"]["scaling"] == 0.5


def test_what_is_replaced_makes_room(tmp_path):
    spill = Spill(tmp_path, room=100)
    for value in (1.0, 2.0):
        spill.put(0, "original", torch.full((25,), value))
    assert not list(tmp_path.iterdir())
    spill.put(1, "original", torch.zeros(25))
    assert len(list(tmp_path.iterdir())) == 1
    assert (spill.get(0, "original") == 2).all() and (spill.get(1, "original") == 0).all()


def test_what_leaves_memory_is_found_on_disk(tmp_path):
    spill = Spill(tmp_path, room=100)
    spill.put(0, "original", torch.ones(25))
    spill.leave_memory()
    spill.put(1, "original", torch.ones(1))
    assert len(list(tmp_path.iterdir())) == 2
    assert (spill.get(0, "original") == 1).all()


def test_without_room_no_more_batches_are_in_memory_than_the_one_at_work_and_the_one_before(monkeypatch):
    """Batches of different widths, so that every tensor of hidden states tells which batch it belongs to."""
    monkeypatch.setattr(streams, "_room_on", lambda device: 0)
    model, alive, most = build(), [], []

    def watch(module, args, output):
        alive.extend(weakref.ref(tensor) for tensor in (*args, output))
        alive[:] = [reference for reference in alive if reference() is not None]
        most.append(len({reference().shape[1] for reference in alive}))

    for layer in range(6):
        layer_of(model, layer).input_layernorm.register_forward_hook(watch)
        layer_of(model, layer).mlp.register_forward_hook(watch)
    run(model, batches(widths=tuple(range(5, 15))))
    assert len(most) > 100
    assert max(most) <= 2


def nan_in(layer, part):
    def spoil(model):
        weight = getattr(layer_of(model, layer), part).weight
        with torch.no_grad():
            weight.view(-1)[0] = torch.nan

    return spoil


def broken_after(count, error):
    yield from batches()[:count]
    raise error


def nothing(_):
    pass


FAILURES = {
    "NaN below the leaders": (nan_in(0, "input_layernorm"), batches, ValueError, r"not finite in decoder layer 2"),
    "NaN in a leader": (nan_in(4, "input_layernorm"), batches, ValueError, r"not finite in decoder layer 5"),
    "NaN in a follower": (
        nan_in(5, "input_layernorm"),
        batches,
        ValueError,
        r"not finite in decoder layer 5, batch 0",
    ),
    "dataloader breaks": (nothing, lambda: broken_after(2, OSError("the disk is gone")), OSError, "the disk is gone"),
    "dataloader breaks at once": (
        nothing,
        lambda: broken_after(0, OSError("the disk is gone")),
        OSError,
        "the disk is gone",
    ),
    "interrupted": (nothing, lambda: broken_after(2, KeyboardInterrupt()), KeyboardInterrupt, ""),
    "no input_ids later": (nothing, lambda: [*batches(), {"labels": 1}], ValueError, r"batch 4 .* no input_ids"),
    "empty": (nothing, list, ValueError, "dataloader is empty"),
}


@pytest.mark.parametrize("failure", FAILURES)
@both_ranks
def test_a_failure_leaves_everything_as_it_was(failure, rank, tmp_path):
    spoil, data, error, message = FAILURES[failure]
    model = build(rank=rank)
    spoil(model)
    model.train()
    before = all_compensations(model)
    with pytest.raises(error, match=message):
        run(model, data(), spill_directory=tmp_path)
    after = all_compensations(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.active_adapters == ["default"]
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(layer_of(model, layer)) for layer in range(6))
    assert not any(layer_of(model, layer).self_attn._forward_hooks for layer in range(6))
    assert not any(module.disable_adapters for module in model.modules() if isinstance(module, UniAttnLayer))
    assert not list(tmp_path.iterdir())


def test_every_modules_training_mode_comes_back():
    model = build().train()
    layer_of(model, 2).mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    run(model)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_nothing_but_the_compensation_changes():
    model = build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    run(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trainable
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())


def with_second_adapter():
    model = build()
    model.add_adapter("second", UniAttnConfig(superblocks=[[0, 1, 2]], task_type="CAUSAL_LM"))
    return model


@both_methods
def test_an_adapter_that_is_not_active_is_calibrated_by_name(method):
    model, active = with_second_adapter(), with_second_adapter()
    before = all_compensations(model)
    report = run(model, method=method, adapter_name="second")
    assert [error.layer for error in report.followers] == [1, 2]
    assert model.active_adapters == ["default"]
    assert all(torch.equal(weight, before[name]) for name, weight in all_compensations(model).items())
    active.set_adapter("second")
    run(active, method=method)
    for layer in (1, 2):
        assert np.abs(compensation_of(model, layer, "second")).max() > 0
        assert np.array_equal(compensation_of(model, layer, "second"), compensation_of(active, layer, "second"))


def test_a_failure_leaves_the_active_adapter_active():
    model = with_second_adapter()
    with pytest.raises(ValueError, match="dataloader is empty"):
        run(model, [], adapter_name="second")
    assert model.active_adapters == ["default"]
    assert {module.active_adapter[0] for module in model.modules() if isinstance(module, UniAttnLayer)} == {"default"}


def test_an_adapter_is_calibrated_by_name_while_adapters_are_disabled():
    model, other = build(), build()
    run(other)
    with model.disable_adapter():
        run(model, adapter_name="default")
        assert all(module.disable_adapters for module in model.modules() if isinstance(module, UniAttnLayer))
    for layer in followers_of(BLOCKS):
        assert np.array_equal(compensation_of(model, layer), compensation_of(other, layer))


@transformers_adapters
def test_a_transformers_model_with_an_injected_adapter_is_calibrated():
    model = loud(tiny_model())
    model.add_adapter(UniAttnConfig(superblocks=BLOCKS))
    other = tiny_adapter(loud(tiny_model()), superblocks=BLOCKS)
    report, expected = run(model), run(other)
    assert report.followers == expected.followers
    for layer in followers_of(BLOCKS):
        actual = model.model.layers[layer].self_attn.uniattn_W["default"].weight
        assert np.array_equal(actual.detach().numpy().T, compensation_of(other, layer))


def test_the_tuner_itself_is_calibrated():
    model, other = build(), build()
    assert run(model.base_model).followers == run(other).followers


def test_gradient_checkpointing_is_no_obstacle():
    model, other = build(), build()
    model.gradient_checkpointing_enable()
    assert run(model.train()).followers == run(other).followers


@pytest.mark.filterwarnings("ignore:attention_dropout")
def test_dropout_is_off_meanwhile_even_in_training_mode():
    model, other = build(("llama", {"attention_dropout": 0.5}, "sdpa", BLOCKS)), build()
    assert run(model.train()).followers == run(other).followers


def test_calibration_lowers_the_distance_of_the_logits_to_the_original():
    model, data = tiny_adapter(loud(tiny_model()), superblocks=BLOCKS, init_weights=True), batches("none")

    @torch.no_grad()
    def distance():
        unified = torch.cat([model(**batch).logits.flatten(0, 1) for batch in data])
        with model.disable_adapter():
            original = torch.cat([model(**batch).logits.flatten(0, 1) for batch in data])
        return (unified - original).norm().item()

    before = distance()
    run(model, data)
    assert distance() < 0.8 * before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"labels": 1, "attention_mask": 2}], "batch 0 .* no input_ids, found ['attention_mask', 'labels'];"),
        ([[1, 2, 3]], "batch 0 .* no input_ids, found list;"),
        (["text"], "batch 0 .* no input_ids, found str;"),
        ([{"input_ids": [[1, 2]]}], "batch 0 .* shapes {'input_ids': ()}; use tensors of (batch, length)"),
        ([{"input_ids": torch.tensor([1, 2])}], "batch 0 .* shapes {'input_ids': (2,)}; use tensors"),
        (
            [{"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 1, 2, 2)}],
            "batch 0 .* 'attention_mask': (1, 1, 2, 2)}; use tensors",
        ),
        ([], "dataloader is empty; calibration needs at least one batch"),
        (
            [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}],
            "dataloader holds only padding (attention_mask is 0 everywhere)",
        ),
    ],
)
def test_unusable_data_is_refused(data, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*").replace(r"\ ", " ")):
        run(build(), data)


@pytest.mark.parametrize("method", ["lstsq", "Ridge", "", None])
def test_an_unknown_method_is_refused(method):
    with pytest.raises(
        ValueError, match=re.escape(f"method={method!r} is not a calibration method; use one of ridge")
    ):
        run(build(), method=method)


@pytest.mark.parametrize("ridge", [0, 0.0, -1e-2, math.nan, math.inf, "0.01", None])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    with pytest.raises(ValueError, match=re.escape(f"ridge={ridge!r} must be a positive number")):
        run(build(), ridge=ridge)


@pytest.mark.parametrize("count", [0, -1])
def test_a_limit_that_leaves_no_data_is_refused(count):
    with pytest.raises(ValueError, match=f"max_batches={count} leaves no data"):
        run(build(), max_batches=count)


def test_an_unknown_adapter_is_refused_with_the_ones_there_are():
    with pytest.raises(ValueError, match=r"adapter_name='third' .* \['default', 'second'\]"):
        run(with_second_adapter(), adapter_name="third")


@pytest.mark.parametrize("make", [tiny_model, lambda: to_standalone(build())], ids=["base", "standalone"])
def test_a_model_without_an_adapter_is_refused(make):
    with pytest.raises(ValueError, match="has no UniAttn adapter; apply get_peft_model"):
        run(make())


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="weights on the meta device"):
        run(build().to("meta"))


def test_inside_original_model_the_model_is_the_base():
    base = loud(tiny_model())
    expected = base(prompt()).logits
    model = tiny_adapter(base, superblocks=BLOCKS)
    with original_model(find_adapter(model)):
        assert torch.equal(model(prompt()).logits, expected)
    assert not torch.allclose(model(prompt()).logits, expected)


def test_inside_unified_model_the_adapter_works_whichever_is_active():
    model = with_second_adapter()
    model.set_adapter("second")
    expected = model(prompt()).logits
    model.set_adapter("default")
    with unified_model(find_adapter(model, "second")):
        assert torch.equal(model(prompt()).logits, expected)
    assert not torch.allclose(model(prompt()).logits, expected)


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize(("context", "disables"), [(original_model, True), (unified_model, False)])
def test_both_streams_restore_what_was_even_after_an_exception(context, disables, disabled):
    model = with_second_adapter()
    layers = [module for module in model.modules() if isinstance(module, UniAttnLayer)]
    for layer in layers:
        layer.enable_adapters(not disabled)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(KeyError), context(find_adapter(model, "second")):
        assert all(layer.disable_adapters == disables for layer in layers)
        raise KeyError
    assert all(layer.disable_adapters == disabled and layer.active_adapters == ["default"] for layer in layers)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_solve_ridge_minimises_the_penalised_error(ridge):
    generator = torch.Generator().manual_seed(0)
    x, error = (torch.randn(50, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    penalty = math.sqrt(ridge * x.square().sum().item() / 8)
    rows = np.concatenate([x.numpy(), penalty * np.eye(8)])
    expected = np.linalg.lstsq(rows, np.concatenate([error.numpy(), np.zeros((8, 8))]), rcond=None)[0]
    assert_close(solve_ridge(x.T @ x, x.T @ error, ridge).numpy(), expected, 1e-10)


@pytest.mark.parametrize("shape", [(5, 8), (8, 8), (20, 8)])
def test_solve_pseudoinverse_ignores_directions_below_the_cutoff(shape):
    """Of singular values 1, 1/2, …, and one below 1e-10 of the largest, the last counts as zero."""
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(*shape, generator=generator, dtype=torch.float64), full_matrices=False)
    s = 1 / torch.arange(1, len(s) + 1, dtype=torch.float64)
    s[-1] = 1e-11
    error = torch.randn(shape[0], 8, generator=generator, dtype=torch.float64)
    expected = (vh[:-1].T / s[:-1]) @ u[:, :-1].T @ error
    assert_close(solve_pseudoinverse(u * s @ vh, error).numpy(), expected.numpy(), 1e-9)


def test_statistics_do_not_depend_on_the_order_or_size_of_their_parts():
    generator = torch.Generator().manual_seed(0)
    x, error, original = (torch.randn(30, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    compensation = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    statistics = TokenStatistics(8, torch.device("cpu"))
    for part in (slice(11, 30), slice(0, 0), slice(0, 11)):
        statistics.add(x[part], error[part], original[part])
    assert statistics.tokens == 30
    assert statistics.error_before() == pytest.approx((error.norm() / original.norm()).item(), rel=1e-12)
    left = ((error - x @ compensation).norm() / original.norm()).item()
    assert statistics.error_after(compensation) == pytest.approx(left, rel=1e-12)
