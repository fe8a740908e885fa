import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """`F.cross_entropy` written out, with soft-capped logits and the z-loss `lse_square_scale * lse**2`.

    The mean divides the cross entropy by the weights of the targets that count, the z-loss by their number.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits.to(wide)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    classes = x.shape[1]
    w = torch.ones(classes, dtype=wide, device=x.device) if weight is None else weight.to(wide)

    counts = target != ignore_index
    x, t = x[counts], target[counts]
    lse = torch.logsumexp(x, dim=1)
    neg_log_p = lse[:, None] - x
    ce = (1 - label_smoothing) * w[t] * neg_log_p.gather(1, t[:, None])[:, 0]
    if label_smoothing != 0:
        ce = ce + label_smoothing / classes * (w * neg_log_p).sum(1)
    z = lse_square_scale * lse**2

    if reduction == "none":
        return torch.zeros(target.shape, dtype=wide, device=x.device).masked_scatter(counts, ce + z)
    if reduction == "sum" or t.numel() == 0:
        return ce.sum() + z.sum()
    return ce.sum() / w[t].sum() + z.sum() / t.numel()
