import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rotary_dim = cos.shape[-1]
    cos, sin = (t.to(wide).unsqueeze(-3) for t in (cos, sin))
    quarter_turn = rotate_neighbours if interleaved else rotate_half

    def rotate(x: Tensor) -> Tensor:
        head, rest = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
        return torch.cat(((head * cos + quarter_turn(head) * sin).to(x.dtype), rest), dim=-1)

    return rotate(q), rotate(k)


def mrope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mrope_section: list[int]) -> tuple[Tensor, Tensor]:
    plane_of_pair = [plane for plane, pairs in enumerate(mrope_section) for _ in range(pairs)]

    def merged(angle: Tensor) -> Tensor:
        columns = [angle[plane, ..., j] for j, plane in enumerate(plane_of_pair * 2)]
        return torch.stack(columns, dim=-1) if columns else angle[0]

    return rope(q, k, merged(cos), merged(sin))
