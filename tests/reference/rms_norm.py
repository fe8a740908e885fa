import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    """Where Hugging Face rounds, this does: 16-bit x is normalised in float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        normalized = normalized.to(x.dtype)
    if weight is not None:
        normalized = normalized.to(wide.dtype) * (offset + weight.to(wide.dtype))
    return normalized.to(x.dtype)
