import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rotary_dim = cos.shape[-1]
    cos, sin = (t.to(wide).unsqueeze(-3) for t in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        head, rest = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
        return torch.cat(((head * cos + rotate_half(head) * sin).to(x.dtype), rest), dim=-1)

    return rotate(q), rotate(k)
