import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate if gate.dtype == torch.float64 else gate.float()
    return F.silu(wide).to(gate.dtype) * up


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    wide = gate if gate.dtype == torch.float64 else gate.float()
    return F.gelu(wide, approximate=approximate).to(gate.dtype) * up


def swiglu_packed(gate_up: Tensor) -> Tensor:
    return swiglu(*gate_up.chunk(2, dim=-1))


def geglu_packed(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    return geglu(*gate_up.chunk(2, dim=-1), approximate)
