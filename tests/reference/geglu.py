import torch
from torch import Tensor


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    wide = gate if gate.dtype == torch.float64 else gate.float()
    return torch.nn.functional.gelu(wide, approximate=approximate).to(gate.dtype) * up


def geglu_packed(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    return geglu(*gate_up.chunk(2, dim=-1), approximate)
