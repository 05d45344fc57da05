"""4-bit weights (GPTQ's format) in all linear maps, the followers' and W_c among them, by the engine's own kernels."""

import copy
import json

import pytest

pytest.importorskip("vllm")

import torch
from engine import engine, generate, log_probabilities, sampling, standalone_model, token_ids
from safetensors.torch import load_file, save_file
from torch import nn

GROUP = 32  # inputs that share a scale
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}


def quantize_to_4_bits(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Round a weight (outputs, inputs) to 16 levels.

    Returns:
        What GPTQ stores for it, and the rounded weight.
    """
    outputs, inputs = weight.shape
    groups = weight.T.reshape(inputs // GROUP, GROUP, outputs)
    scales = (groups.abs().amax(1, keepdim=True) / 7).half().float()
    levels = (groups / scales).round().clamp(-8, 7)
    rounded = (levels * scales).reshape(inputs, outputs).T.contiguous()
    stored = {
        "qweight": _eight_in_one((levels + 8).int().reshape(inputs // 8, 8, outputs)),
        "qzeros": _eight_in_one(torch.full((inputs // GROUP, outputs // 8, 8), 7).int().transpose(1, 2)),
        "scales": scales.squeeze(1).half(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }
    return stored, rounded


def _eight_in_one(levels: torch.Tensor) -> torch.Tensor:
    """Integers below 16, (rows, 8, columns), packed along their middle dimension."""
    shifts = torch.arange(8, dtype=torch.int64).mul(4).view(1, 8, 1)
    packed = (levels.long() << shifts).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int().contiguous()


def quantized_checkpoint(folder):
    """A standalone model, and the same with rounded weights, which `folder` holds in 4 bits."""
    model = standalone_model(changes={"hidden_size": 128, "intermediate_size": 192})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # so that bfloat16 is precise enough to tell right from wrong
                parameter.mul_(0.4)
    model.save_pretrained(folder)
    original = copy.deepcopy(model)
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            stored, rounded = quantize_to_4_bits(module.weight.detach())
            module.weight.data = rounded
            del tensors[f"model.layers.{name}.weight"]
            tensors.update({f"model.layers.{name}.{key}": tensor for key, tensor in stored.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
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


def test_4_bit_weights_generate_what_the_rounded_weights_do(tmp_path):
    original, rounded = quantized_checkpoint(tmp_path)
    with engine(tmp_path, num_gpu_blocks_override=64, dtype="bfloat16") as llm:
        outputs = generate(llm, token_ids(5, 40, 70), sampling(40))
    # The kernels compute in bfloat16, so not exactly; but far nearer than the rounding of the weights is.
    assert distance(outputs, rounded) < 0.1 < distance(outputs, original) / 3
