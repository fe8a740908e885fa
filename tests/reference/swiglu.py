import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate if gate.dtype == torch.float64 else gate.float()
    return torch.nn.functional.silu(wide).to(gate.dtype) * up


def swiglu_packed(gate_up: Tensor) -> Tensor:
    return swiglu(*gate_up.chunk(2, dim=-1))
