"""The implementations that are compared: tables from operator name to a function of a case's arguments.

A table need not have every operator. Loading one may fail, for instance because a package is missing: it then
raises `Unavailable` with the reason, and the benchmark goes on without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .ops import NORM_EPS, mrope_section

Functions = dict[str, Callable]

MEBI = 2**20


class Unavailable(RuntimeError):
    """This provider cannot run here."""


def within(function: Callable, workspace_mib: int | None) -> Callable:
    """Our fused linear cross entropy with this limit of its workspace; None for the limit it has."""
    return functools.partial(function, workspace_bytes=workspace_mib * MEBI) if workspace_mib else function


def torch_eager(device: torch.device) -> Functions:
    """What an unpatched Hugging Face LLaMA runs: its own functions, called as the model calls them."""
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
        from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
    except ImportError as error:
        raise Unavailable(f"needs transformers: {error}") from error

    class Norm:
        """What LlamaRMSNorm.forward reads; a module would not take a plain tensor as its weight."""

        variance_epsilon = NORM_EPS

        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = weight

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return LlamaRMSNorm.forward(Norm(weight), x)

    def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple:
        total = x + residual
        return rms_norm(total, weight), total

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)

    def mrope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        # transformers puts the planes' columns together where it computes the angles.
        sections = mrope_section(cos.shape[-1]) * 2
        cos, sin = (
            torch.cat([part[i % 3] for i, part in enumerate(t.split(sections, dim=-1))], dim=-1)
            for t in (cos, sin)
        )
        return apply_rotary_pos_emb(q, k, cos, sin)

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * F.silu(gate)  # as Phi3MLP writes it

    def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate="tanh") * up

    def geglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
        return geglu(*gate_up.chunk(2, dim=-1))

    def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ForCausalLMLoss(logits, labels=None, shift_labels=target, vocab_size=logits.shape[-1])

    def fused_linear_cross_entropy(
        x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        return cross_entropy(F.linear(x, weight), target)

    return {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "layer_norm": layer_norm,
        "rope": apply_rotary_pos_emb,
        "mrope": mrope,
        "swiglu": swiglu,
        "swiglu_packed": swiglu_packed,
        "geglu": geglu,
        "geglu_packed": geglu_packed,
        "cross_entropy": cross_entropy,
        "fused_linear_cross_entropy": fused_linear_cross_entropy,
    }


def torch_compiled(device: torch.device) -> Functions:
    """The same functions through `torch.compile`, with static shapes and no graph break."""
    return {op: torch.compile(f, fullgraph=True, dynamic=False) for op, f in torch_eager(device).items()}


def liger_triton(device: torch.device) -> Functions:
    """Liger-Kernel's Triton operators."""
    if device.type != "cuda":
        raise Unavailable("Liger's Triton operators run on CUDA only")
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError as error:
        raise Unavailable(f"needs liger-kernel: {error}") from error

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return liger.liger_rms_norm(x, weight, NORM_EPS)

    def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple:
        return liger.liger_fused_add_rms_norm(x, residual, weight, NORM_EPS)

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return liger.liger_layer_norm(x, weight, bias, NORM_EPS)

    def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
        return liger.liger_swiglu(*gate_up.chunk(2, dim=-1))  # as LigerPhi3SwiGLUMLP calls it

    def geglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
        return liger.liger_geglu(*gate_up.chunk(2, dim=-1))

    def mrope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        return liger.liger_qwen2vl_mrope(q, k, cos, sin, mrope_section(cos.shape[-1]))

    return {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "layer_norm": layer_norm,
        "rope": liger.liger_rope,
        "mrope": mrope,
        "swiglu": liger.liger_swiglu,
        "swiglu_packed": swiglu_packed,
        "geglu": liger.liger_geglu,
        "geglu_packed": geglu_packed,
        "cross_entropy": liger.liger_cross_entropy,
        "fused_linear_cross_entropy": liger.liger_fused_linear_cross_entropy,
    }


def trl_head(device: torch.device) -> Functions:
    """The head that TRL's ``SFTTrainer`` computes the loss with: logits by tiles of the vocabulary, twice."""
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as tile
    except ImportError as error:
        raise Unavailable(f"needs trl 1.16: {error}") from error

    def fused_linear_cross_entropy(
        x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        log_probs, *_ = ChunkedLogProbFunction.apply(
            x, weight, None, target, 1.0, tile, None, 1.0, ("log_probs",)
        )
        return -log_probs.sum() / target.numel()

    return {"fused_linear_cross_entropy": fused_linear_cross_entropy}


def liger_ops(device: torch.device) -> Functions:
    """This package."""
    try:
        from liger_ops import functional as ours
    except ImportError as error:
        raise Unavailable(f"liger_ops does not load: {error}") from error

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ours.rms_norm(x, weight, NORM_EPS)

    def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple:
        return ours.add_rms_norm(x, residual, weight, NORM_EPS)

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ours.layer_norm(x, weight, bias, NORM_EPS)

    def mrope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        return ours.mrope(q, k, cos, sin, mrope_section(cos.shape[-1]))

    return {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "layer_norm": layer_norm,
        "rope": ours.rope,
        "mrope": mrope,
        "swiglu": ours.swiglu,
        "swiglu_packed": ours.swiglu_packed,
        "geglu": ours.geglu,
        "geglu_packed": ours.geglu_packed,
        "cross_entropy": ours.cross_entropy,
        "fused_linear_cross_entropy": ours.fused_linear_cross_entropy,
    }


PROVIDERS: dict[str, Callable[[torch.device], Functions]] = {
    "torch": torch_eager,
    "compile": torch_compiled,
    "liger": liger_triton,
    "trl": trl_head,
    "ours": liger_ops,
}
