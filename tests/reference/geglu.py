import math

import torch
from torch import Tensor


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """Without the cancellation of `1 + tanh` and `1 + erf`, which leaves few digits in value and slope."""
    x = gate if gate.dtype == torch.float64 else gate.float()
    if approximate == "tanh":
        u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        tail = torch.sigmoid(-2 * u.abs())
        activated = x * torch.where(x < 0, tail, 1 - tail)
    else:
        activated = x * torch.erfc(-x / math.sqrt(2)) / 2
    return activated.to(gate.dtype) * up


def geglu_packed(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    return geglu(*gate_up.chunk(2, dim=-1), approximate)
