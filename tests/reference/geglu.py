import math

import torch
from torch import Tensor


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """Without the cancellation of `1 + tanh` and `1 + erf`, which leaves few digits for negative gates."""
    x = gate if gate.dtype == torch.float64 else gate.float()
    if approximate == "tanh":
        activated = x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        activated = x * torch.erfc(-x / math.sqrt(2)) / 2
    return activated.to(gate.dtype) * up


def geglu_packed(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    return geglu(*gate_up.chunk(2, dim=-1), approximate)
