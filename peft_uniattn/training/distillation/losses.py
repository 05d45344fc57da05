"""How far a student is from its teacher: in its predictions, and in the residual stream behind attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction


def divergence(
    student: PreTrainedModel,
    student_hidden: torch.Tensor,
    teacher: PreTrainedModel,
    teacher_hidden: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """
    Sum over positions of T² · KL(teacher ‖ student) between next-token distributions at temperature T.

    T² keeps the size of the gradients independent of T (https://arxiv.org/abs/1503.02531). TRL's kernel projects both
    hidden states in tiles, in the forward and again in the backward pass, so that neither model's logits ever exist in
    full.

    Args:
        student: whose output head gets gradients if it is trainable.
        student_hidden: what the student's backbone returns, (positions, hidden size).
        teacher: whose output head is used, without gradients. May be the student.
        teacher_hidden: what the teacher's backbone returns at the same positions.
        temperature: T.
    """
    weight, bias = _parameters(student.get_output_embeddings())
    # Of a head that is trained with an adapter, the teacher's is the original.
    teacher_head = teacher.get_output_embeddings()
    teacher_weight, teacher_bias = _parameters(getattr(teacher_head, "original_module", teacher_head))
    scale, softcap = _logit_transform(student.config.get_text_config(decoder=True))
    teacher_scale, teacher_softcap = _logit_transform(teacher.config.get_text_config(decoder=True))
    per_position, _ = ChunkedDivergenceFunction.apply(
        student_hidden.to(weight.device),
        weight,
        bias,
        teacher_hidden.to(weight.device),
        teacher_weight.detach().to(weight.device),
        None if teacher_bias is None else teacher_bias.detach().to(weight.device),
        0.0,  # of the divergences that the kernel knows: forward KL
        temperature,
        scale,
        softcap,
        teacher_scale,
        teacher_softcap,
    )
    return temperature**2 * per_position.sum()


def residual_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """
    Sum over positions of ‖ε‖² / ‖x'‖², with ε = x' − x'_student as in the paper's equation 13.

    Args:
        student: the residual stream behind a follower's attention, (positions, hidden size).
        teacher: x', the original model's at the same place.
    """
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    error = torch.linalg.vector_norm(student - teacher, dim=-1, dtype=dtype)
    size = torch.linalg.vector_norm(teacher, dim=-1, dtype=dtype)
    return (error / size).square().sum()


def _parameters(head: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):  # a head that FSDP2 shards by itself
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    return weight, bias


def _logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """What an architecture does to its head's output: the factor, and the soft cap or None."""
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None and (scaling := getattr(config, "logits_scaling", None)) is not None:
        # Granite divides by it.
        scale = scaling if config.model_type.endswith("hyperclovax") else 1 / scaling
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)
