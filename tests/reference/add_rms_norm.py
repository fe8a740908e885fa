from torch import Tensor

from .rms_norm import rms_norm


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor]:
    """The addition and the norm as two steps, rounded to x's dtype in between."""
    total = x + residual
    return rms_norm(total, weight, eps, offset, casting_mode), total
