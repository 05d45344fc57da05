"""
Compares parallel wrappers on two ranks with a single process; run by tests and, on two GPUs, by hand:

    torchrun --nproc-per-node 2 tests/two_ranks.py --device cuda --dtypes float32 bfloat16 --out two_gpus.json

Every case trains one step on half of a batch per rank. Its loss, gradients and new weights are compared with those of
one process that sees the whole batch. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import traceback
from pathlib import Path

import accelerate
import peft
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from peft_uniattn import UniAttnConfig, to_standalone

SEED = 0
SIZES = {
    "small": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "medium": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "vocab_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
LENGTH = {"small": 12, "medium": 256}
SUPERBLOCKS = [[1, 2, 3], [4, 5]]
# What a family needs beyond the sizes. Leaders see everything, as the followers of a narrow mask need it.
NARROW, FULL = "sliding_attention", "full_attention"
SPECIAL = {
    "gemma2": {"head_dim": 8, "sliding_window": 4, "layer_types": [NARROW, FULL, NARROW, NARROW, FULL, NARROW]},
    "qwen3": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
FAMILIES = ("llama", *SPECIAL)
LEARNING_RATE = 0.1


def build(
    form: str, size: str, dtype: torch.dtype, device: torch.device, checkpointed: bool, family: str = "llama"
) -> torch.nn.Module:
    """The same model on every rank: an adapter with only W_c trainable, or a standalone model with everything."""
    torch.manual_seed(SEED)
    sizes = {"num_hidden_layers": 6, "initializer_range": 0.05, **SIZES[size], **SPECIAL.get(family, {})}
    config = AutoConfig.for_model(family, **sizes)
    base = AutoModelForCausalLM.from_config(config, **implementations(family)).to(device)
    for parameter in base.parameters():  # not by to(dtype), which would round RoPE's frequencies as well
        parameter.data = parameter.data.to(dtype)
    masks = {"follower_mask": "leader"} if family == "gemma2" else {}
    uniattn = UniAttnConfig(superblocks=SUPERBLOCKS, init_weights=False, task_type="CAUSAL_LM", **masks)
    # One data type per sharded group: PEFT would keep the compensation of a bfloat16 base in float32.
    model = peft.get_peft_model(base, uniattn, autocast_adapter_dtype=False)
    if form == "standalone":
        model = to_standalone(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def implementations(family: str) -> dict[str, str]:
    """What runs on CPUs in float64: transformers has no sdpa for Gemma-2, and grouped products of experts do not."""
    return {"attn_implementation": "eager" if family == "gemma2" else "sdpa", "experts_implementation": "eager"}


def batch(size: str, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(2, SIZES[size]["vocab_size"], (4, LENGTH[size]), generator=generator).to(device)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids, use_cache=False).loss


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters by the names that they have without a wrapper."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for wrapper in ("_fsdp_wrapped_module.", "module."):
        parameters = {name.replace(wrapper, ""): p for name, p in parameters.items()}
    return parameters


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def step(model: torch.nn.Module) -> None:
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE).step()


def single(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    """Loss, gradients and weights after a step, in one process."""
    loss = loss_of(model, ids)
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in trained(model).items()}
    step(model)
    return loss.detach(), gradients, {name: whole(p) for name, p in trained(model).items()}


def ddp(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    return single(DistributedDataParallel(model), ids)


def fsdp1(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    device = ids.device if ids.is_cuda else torch.device("cpu")
    policy = ModuleWrapPolicy({type(layer) for layer in decoder_layers(model)})
    model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    loss = loss_of(model, ids)
    loss.backward()
    gradients = joined({name: p.grad for name, p in trained(model).items()})
    step(model)
    return loss.detach(), gradients, joined(trained(model))


def joined(shards: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Flat tensors from every rank's piece of them."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: None if t is None else t.detach().cpu() for name, t in shards.items()})
    pieces = {name: [rank[name] for rank in everyone if rank[name] is not None] for name in shards}
    return {name: torch.cat([piece.flatten() for piece in each]) for name, each in pieces.items()}


def fsdp2(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    mesh = dist.device_mesh.init_device_mesh(ids.device.type, (dist.get_world_size(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    return single(fully_shard(model, mesh=mesh), ids)


def zero(stage: int):
    def run(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        parameters = trained(model)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(list(parameters.values()), lr=LEARNING_RATE),
            config={
                "train_micro_batch_size_per_gpu": len(ids),
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            },
        )
        loss = loss_of(engine, ids)
        engine.backward(loss)
        gradients = {name: safe_get_full_grad(p).clone() for name, p in parameters.items()}
        engine.step()
        return loss.detach(), gradients, {name: safe_get_full_fp32_param(p).clone() for name, p in parameters.items()}

    return run


# "alone" does not exchange gradients: what the comparison has to notice.
WRAPPERS = {"alone": single, "ddp": ddp, "fsdp1": fsdp1, "fsdp2": fsdp2, "zero2": zero(2), "zero3": zero(3)}


def difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest norm of a difference, relative to the expected tensor; infinite if the names differ or one is zero."""
    if actual.keys() != expected.keys() or not all(tensor.any() for tensor in expected.values()):
        return float("inf")
    pairs = [(actual[name].cpu().double().flatten(), e.cpu().double().flatten()) for name, e in expected.items()]
    return max(((a - e).norm() / e.norm()).item() for a, e in pairs)


def run_case(
    wrapper: str, form: str, checkpointed: bool, dtype: str, size: str, device: torch.device, family: str
) -> dict:
    ids = batch(size, device)
    model = build(form, size, getattr(torch, dtype), device, False, family)
    loss, gradients, weights = single(model, ids)
    model = build(form, size, getattr(torch, dtype), device, checkpointed, family)
    part = ids.chunk(dist.get_world_size())[dist.get_rank()]
    local_loss, own_gradients, own_weights = WRAPPERS[wrapper](model, part)
    dist.all_reduce(local_loss)
    return {
        "loss": abs(local_loss.item() / dist.get_world_size() - loss.item()) / loss.item(),
        "gradients": difference(own_gradients, gradients),
        "weights": difference(own_weights, weights),
        "tensors": len(gradients),
    }


def tensor_parallel(form: str, dtype: str, size: str, device: torch.device, scratch: Path, family: str) -> dict:
    """A saved model loaded with tp_plan="auto": logits, gradients of W_c and generated tokens."""
    ids, folder = batch(size, device), scratch / f"tensor parallel {form}"
    whole_model = build(form, size, getattr(torch, dtype), device, False, family)
    if dist.get_rank() == 0:
        whole_model.save_pretrained(folder)
        if form == "adapter":
            whole_model.unload().save_pretrained(folder / "base")
            whole_model = build(form, size, getattr(torch, dtype), device, False, family)
    dist.barrier()
    options = {"tp_plan": "auto", "dtype": getattr(torch, dtype), **implementations(family)}
    if form == "standalone":
        sharded = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        sharded = AutoModelForCausalLM.from_pretrained(folder / "base", **options)
        sharded = peft.PeftModel.from_pretrained(sharded, folder, is_trainable=True, autocast_adapter_dtype=False)
    logits, gradients, tokens = zip(*(outputs(model, ids) for model in (sharded, whole_model)), strict=True)
    return {
        "logits": difference({"logits": logits[0]}, {"logits": logits[1]}),
        "gradients": difference({"W_c": gradients[0]}, {"W_c": gradients[1]}),
        "same_tokens": torch.equal(*tokens),
        "share_of_value_rows": value_rows(sharded) / value_rows(whole_model),
    }


def outputs(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, the gradient of a compensation, and generated tokens."""
    loss_of(model.train(), ids).backward()
    gradient = whole(of_follower(model, "compensation.weight", "uniattn_W.default.weight").grad)
    model.eval()
    with torch.no_grad():
        return whole(model(ids).logits), gradient, model.generate(ids[:, :4], max_new_tokens=6, do_sample=False)


def value_rows(model: torch.nn.Module) -> int:
    """Rows of a follower's value projection that this rank holds."""
    weight = of_follower(model, "v_proj.weight", "qkv_proj.weight")
    return (weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]


def of_follower(model: torch.nn.Module, *endings: str) -> torch.nn.Parameter:
    """The parameter of the lowest follower's attention whose name ends with one of `endings`."""
    return next(p for name, p in model.named_parameters() if "layers.2.self_attn." in name and name.endswith(endings))


def over_two_devices(
    form: str, cut: int, devices: tuple, dtype: str, size: str, scratch: Path, family: str = "llama"
) -> dict:
    """A model whose layers from `cut` up are on the second of two devices, against one that is on the first."""
    first = torch.device("cuda", devices[0]) if isinstance(devices[0], int) else torch.device(devices[0])
    device_map = {f"model.layers.{layer}": devices[int(layer >= cut)] for layer in range(6)}
    device_map.update(dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), devices[0]))
    options = {"device_map": device_map, "dtype": getattr(torch, dtype), "offload_folder": scratch / "offload"}
    options.update(implementations(family))
    ids = batch(size, first)
    model = build(form, size, options["dtype"], first, False, family).eval()
    model.save_pretrained(scratch / form)
    if form == "standalone":
        spread = AutoModelForCausalLM.from_pretrained(scratch / form, **options)
    else:
        model.unload().save_pretrained(scratch / "base")
        model = build(form, size, options["dtype"], first, False, family).eval()
        spread = AutoModelForCausalLM.from_pretrained(scratch / "base", **options)
        offload = {"offload_dir": str(scratch / "offload adapter")}
        spread = peft.PeftModel.from_pretrained(spread, scratch / form, autocast_adapter_dtype=False, **offload)
    generated = [each.generate(ids[:, :4], max_new_tokens=6, do_sample=False) for each in (spread, model)]
    with torch.no_grad():
        logits = [each(ids).logits.to(first) for each in (spread, model)]
    return {
        "logits": difference({"logits": logits[0]}, {"logits": logits[1]}),
        "same_tokens": torch.equal(generated[0].to(first), generated[1]),
        "devices": sorted({str(parameter.device) for parameter in spread.parameters()}),
    }


def attempt(case: str, function, *args) -> dict:
    """What `function` returns, or what it raises."""
    started = time.perf_counter()
    try:
        result = function(*args)
    except Exception:
        result = {"error": traceback.format_exc()}
    if dist.get_rank() == 0:
        print(f"{time.perf_counter() - started:6.1f} s  {case}: {result}", flush=True)
    return result


def results_of(options: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    results = {}
    for dtype in options.dtypes:
        for wrapper in options.wrappers:
            for form in ("adapter", "standalone"):
                for checkpointed in (False, True):
                    case = f"{wrapper}, {form}, {'checkpointed' if checkpointed else 'not checkpointed'}, {dtype}"
                    arguments = (wrapper, form, checkpointed, dtype, options.size, device, options.family)
                    results[case] = attempt(case, run_case, *arguments)
        if options.tensor_parallel:
            for form in ("adapter", "standalone"):
                case = f"tensor parallel, {form}, {dtype}"
                arguments = (form, dtype, options.size, device, options.scratch, options.family)
                results[case] = attempt(case, tensor_parallel, *arguments)
        if device.type == "cuda" and dist.get_rank() == 0:
            for form in ("adapter", "standalone"):
                for cut, second in ((2, 1), (3, 1), (5, 1), (2, "cpu")):
                    if second == "cpu" and form == "adapter":
                        continue
                    case = f"device_map, {form}, layers from {cut} on {second}, {dtype}"
                    arguments = (form, cut, (0, second), dtype, options.size, options.scratch, options.family)
                    results[case] = attempt(case, over_two_devices, *arguments)
        dist.barrier()
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtypes", nargs="+", default=["float64"])
    parser.add_argument("--wrappers", nargs="*", choices=WRAPPERS, default=["ddp", "fsdp1", "fsdp2"])
    parser.add_argument("--tensor-parallel", action="store_true")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models that are saved on the way")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    torch.set_num_threads(1)
    device = torch.device(options.device, int(os.environ["LOCAL_RANK"]) if options.device == "cuda" else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    results = results_of(options, device)
    if dist.get_rank() == 0:
        document = {"environment": environment(device), "settings": settings(options), "results": results}
        options.out.write_text(json.dumps(document, indent=2) + "\n")
        print(json.dumps(document))
    dist.destroy_process_group()


def environment(device: torch.device) -> dict[str, str]:
    modules = (torch, transformers, peft, accelerate)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "hardware": f"{dist.get_world_size()} x {hardware}",
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
    }


def settings(options: argparse.Namespace) -> dict:
    return {
        "seed": SEED,
        "model": {"family": options.family, "layers": 6, **SIZES[options.size]},
        "superblocks": SUPERBLOCKS,
        "batch": [4, LENGTH[options.size]],
        "optimizer": f"SGD, lr {LEARNING_RATE}, one step",
        "figures": "relative differences from one process with the whole batch: largest over all tensors, by norm",
    }


if __name__ == "__main__":
    main()
