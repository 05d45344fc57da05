"""Quantized weights in all linear maps, the followers' and W_c among them, by the engine's own kernels."""

import copy
import json

import pytest

pytest.importorskip("vllm")

import torch
from engine import engine, generate, log_probabilities, sampling, standalone_model, token_ids
from safetensors.torch import load_file, save_file
from torch import nn

GROUP = 32  # inputs that share a scale
BLOCK = 128  # inputs and outputs that share a scale in FP8
CONFIGS = {
    "gptq": {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False},
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "awq": {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of the outputs in one integer


def quantize(weight: torch.Tensor, method: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Round a weight (outputs, inputs).

    Returns:
        What is stored for it, and the rounded weight.
    """
    if method != "fp8":
        return quantize_to_4_bits(weight, method)
    blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    rounded = (blocks / scales).to(torch.float8_e4m3fn)
    stored = {"weight": rounded.reshape(weight.shape), "weight_scale_inv": scales[:, 0, :, 0].contiguous()}
    return stored, (rounded.float() * scales).reshape(weight.shape)


def quantize_to_4_bits(weight: torch.Tensor, method: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Round a weight (outputs, inputs) to 16 levels, in the format of GPTQ or AWQ.
    """
    outputs, inputs = weight.shape
    groups = weight.T.reshape(inputs // GROUP, GROUP, outputs)
    scales = (groups.abs().amax(1, keepdim=True) / 7).half().float()
    levels = (groups / scales).round().clamp(-8, 7)
    rounded = (levels * scales).reshape(inputs, outputs).T.contiguous()
    levels, zeros = (levels + 8).int().reshape(inputs, outputs), torch.full((inputs // GROUP, outputs), 8).int()
    if method == "gptq":  # eight inputs in one integer; the zero point is stored less one
        stored = {
            "qweight": _eight_in_one(levels.reshape(inputs // 8, 8, outputs)),
            "qzeros": _eight_in_one((zeros - 1).unflatten(1, (-1, 8)).transpose(1, 2)),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
        }
    else:
        stored = {
            name: _eight_in_one(tensor.unflatten(1, (-1, 8))[..., AWQ_ORDER].transpose(1, 2))
            for name, tensor in (("qweight", levels), ("qzeros", zeros))
        }
    return stored | {"scales": scales.squeeze(1).half()}, rounded


def _eight_in_one(levels: torch.Tensor) -> torch.Tensor:
    """Integers below 16, (rows, 8, columns), packed along their middle dimension."""
    shifts = torch.arange(8, dtype=torch.int64).mul(4).view(1, 8, 1)
    packed = (levels.long() << shifts).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int().contiguous()


def quantized_checkpoint(folder, method: str):
    """A standalone model, and the same with rounded weights, which `folder` holds quantized."""
    model = standalone_model(changes={"hidden_size": 128, "head_dim": 64, "intermediate_size": 256})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # so that bfloat16 is precise enough to tell right from wrong
                parameter.mul_(0.4)
    model.save_pretrained(folder)
    original = copy.deepcopy(model)
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            stored, rounded = quantize(module.weight.detach(), method)
            module.weight.data = rounded
            del tensors[f"model.layers.{name}.weight"]
            tensors.update({f"model.layers.{name}.{key}": tensor for key, tensor in stored.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method} | CONFIGS[method]})
    )
    return original, model


def distance(outputs, model) -> float:
    """Root mean square difference of the log-probabilities that were given out to those of `model`."""
    differences = []
    for output in outputs:
        (completion,) = output.outputs
        expected = log_probabilities(model, output.prompt_token_ids, completion.token_ids)
        for got, row in zip(completion.logprobs, expected, strict=True):
            values = torch.tensor([entry.logprob for entry in got.values()], dtype=torch.float64)
            differences.append(values - row[list(got)])
    return torch.cat(differences).square().mean().sqrt().item()


@pytest.mark.parametrize("method", CONFIGS)
def test_quantized_weights_generate_what_the_rounded_weights_do(method, tmp_path):
    original, rounded = quantized_checkpoint(tmp_path, method)
    with engine(tmp_path, num_gpu_blocks_override=64, dtype="bfloat16") as llm:
        outputs = generate(llm, token_ids(5, 40, 70), sampling(40))
    # The kernels compute in bfloat16, so not exactly; but far nearer than the rounding of the weights is.
    assert 4 * distance(outputs, rounded) < distance(outputs, original)
