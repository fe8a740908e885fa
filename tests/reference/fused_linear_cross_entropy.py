import torch
from torch import Tensor

from tests.reference.cross_entropy import cross_entropy


def fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    num_items: Tensor | float | None = None,
    accum_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Cross entropy of `F.linear(input, weight, bias)`. The last two options change no meaning."""
    logits = torch.nn.functional.linear(input, weight, bias)
    options = dict(
        weight=ce_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
    )
    if num_items is None or reduction != "mean":
        return cross_entropy(logits, target, reduction=reduction, **options)
    return cross_entropy(logits, target, reduction="sum", **options) / num_items
