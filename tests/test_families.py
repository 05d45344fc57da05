"""Every supported family keeps every promise; what each means is written in family_checks.py."""

from __future__ import annotations

import family_checks as checks
import pytest
from family_models import CASES, MIXED, SPECIAL
from transformers import cache_utils

# transformers quantizes caches of models whose layers all have full attention.
UNIFORM = [case for case in CASES if case.family not in MIXED and "sliding_window" not in SPECIAL.get(case.family, {})]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_back_end = pytest.mark.parametrize(
    ("case", "back_end"), [pytest.param(c, b, id=f"{c}-{b}") for c in CASES for b in c.back_ends]
)


@every_case
def test_a_follower_of_itself_reproduces_a_layer_and_anything_else_is_refused(case):
    checks.check_probe(case)


@every_back_end
def test_without_the_adapter_the_model_is_the_base_bit_for_bit(case, back_end):
    checks.check_disabled(case, back_end)


@every_back_end
def test_up_to_the_lowest_leader_nothing_changes_bit_for_bit(case, back_end):
    checks.check_leader(case, back_end)


@every_back_end
def test_a_followers_output_is_that_of_equation_14(case, back_end):
    checks.check_reconstruction(case, back_end)


@every_case
def test_attentions_of_followers_are_those_of_their_leaders(case):
    checks.check_output_attentions(case)


@every_back_end
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_logits_are_the_uncached_ones(case, back_end, cache):
    checks.check_cache(case, back_end, cache)


@every_back_end
def test_an_offloaded_cache_gives_the_same_tokens(case, back_end):
    checks.check_offloaded(case, back_end)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="needs transformers with an fp8 cache")
@pytest.mark.parametrize(
    ("case", "back_end"), [pytest.param(c, b, id=f"{c}-{b}") for c in UNIFORM for b in c.back_ends]
)
def test_a_quantized_cache_keeps_values_of_followers_and_no_keys(case, back_end):
    checks.check_quantized_cache(case, back_end)


@every_back_end
def test_padding_on_the_left_changes_nothing(case, back_end):
    checks.check_padding(case, back_end)


@every_back_end
def test_gradients_of_a_leader_are_those_of_finite_differences(case, back_end):
    checks.check_gradient(case, back_end)


@every_back_end
def test_gradients_with_checkpointing_are_those_without_it(case, back_end):
    checks.check_checkpointing(case, back_end)


@every_case
def test_a_saved_adapter_is_the_same_model_when_loaded(case, tmp_path):
    checks.check_saving(case, tmp_path)


@every_back_end
def test_the_standalone_model_is_the_adapted_one(case, back_end):
    checks.check_standalone(case, back_end)


@every_case
def test_a_saved_standalone_model_is_the_same_when_loaded(case, tmp_path):
    checks.check_standalone_saving(case, tmp_path)


@pytest.mark.slow
@every_case
def test_compiled_logits_are_the_eager_ones(case):
    """Ten seconds a case on a quiet core."""
    checks.check_compile(case, case.back_ends[-1])
