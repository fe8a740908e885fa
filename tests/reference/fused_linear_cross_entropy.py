import torch
from torch import Tensor

from liger_ops.functional import CrossEntropyOutput

from .cross_entropy import cross_entropy


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
    **options: bool,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy of `F.linear(input, weight, bias)`; accum_dtype and workspace_bytes change no meaning."""
    logits = torch.nn.functional.linear(input, weight, bias)
    options |= dict(
        weight=ce_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
    )
    if num_items is None or reduction != "mean":
        return cross_entropy(logits, target, reduction=reduction, **options)
    result = cross_entropy(logits, target, reduction="sum", **options)
    if isinstance(result, Tensor):
        return result / num_items
    result.loss = result.loss / num_items
    if result.z_loss is not None:
        result.z_loss = result.z_loss / num_items
    return result
