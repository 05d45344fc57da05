"""How attention enters the residual stream, family by family, and what calibration makes of it."""

from __future__ import annotations

import pytest
import torch
from conftest import prompt
from family_checks import IDS, Watch, attention_modules
from family_models import CASES
from oracle import Float64Throughout
from torch import nn

from peft_uniattn import calibrate
from peft_uniattn.families import find_decoder, find_family

every_case = pytest.mark.parametrize("case", CASES, ids=str)
# A norm after attention, a factor, or neither.
FEW = ("gemma2", "gemma3_text", "olmo2", "glm4", "exaone4", "kolibri1", "granite", "granitemoe", "llama", "cohere")
few_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.family in FEW and case.follower_mask == "own"], ids=str
)


def silence(layer: nn.Module, attention: nn.Module) -> None:
    """Let everything in a decoder layer that is neither attention nor a norm return zeros."""
    kept = {id(p) for p in attention.parameters()}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if id(parameter) not in kept and "norm" not in name:
                parameter.zero_()


@every_case
@torch.no_grad()
def test_it_is_known_how_attention_enters_the_residual_stream(case):
    """Without its MLP, a layer returns its input and attention's output, as it is, times a factor, or normalised."""
    model = case.base()
    decoder = find_decoder(model, find_family(model.config))
    layer = decoder.layers[2]
    silence(layer, decoder.attention(2))
    seen = {}
    layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(
            before=args[0] if args else kwargs["hidden_states"],
            after=output[0] if isinstance(output, tuple) else output,
        ),
        with_kwargs=True,
    )
    with Float64Throughout(), Watch(model) as watch:
        model(IDS)
    added, attention = seen["after"] - seen["before"], watch.outputs[2]
    is_factor = torch.allclose(added, attention * decoder.residual_multiplier(2), rtol=1e-5, atol=1e-6)
    assert is_factor == (not decoder.normalises_attention(2))


@few_cases
@torch.no_grad()
def test_a_compensation_is_the_least_squares_solution_for_what_follows_attention(case):
    model = case.adapter()
    batches = [{"input_ids": prompt(batch=8, length=12, seed=seed)} for seed in range(4)]
    with Float64Throughout():
        calibrate(model, batches, ridge=1e-12, progress=False)
        decoder = find_decoder(model, find_family(model.config))
        x, original, unified, before = [], [], [], []
        for batch in batches:
            entering = {}
            hook = decoder.layers[3].register_forward_pre_hook(
                lambda module, args, kwargs, entering=entering: entering.update(
                    {len(entering): args[0] if args else kwargs["hidden_states"]}
                ),
                with_kwargs=True,
            )
            with model.disable_adapter(), Watch(model) as base:
                model(**batch, use_cache=False)
            with Watch(model) as adapted:
                model(**batch, use_cache=False)
            hook.remove()
            x.append(adapted.inputs[3].flatten(0, 1))
            original.append(base.outputs[3].flatten(0, 1))
            unified.append(adapted.outputs[3].flatten(0, 1))
            before.append((entering[0] - entering[1]).flatten(0, 1))
    x, original, unified, before = map(torch.cat, (x, original, unified, before))
    actual = attention_modules(model)[3].uniattn_W["default"].weight.T
    error = original - (unified - x @ actual)
    if case.family in ("granite", "granitemoe"):
        error = error + before / model.config.residual_multiplier
    elif case.family in ("llama", "cohere"):
        error = error + before
    else:
        size = original.pow(2).mean(-1, keepdim=True).sqrt()
        x, error = x / size, error / size
    expected = torch.linalg.lstsq(x, error).solution
    torch.testing.assert_close(x @ actual, x @ expected, rtol=1e-4, atol=1e-5 * float(error.abs().max()))
