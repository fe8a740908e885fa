import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate if gate.dtype == torch.float64 else gate.float()
    return torch.nn.functional.silu(wide).to(gate.dtype) * up
