import torch
from torch import Tensor

from liger_ops.functional import CrossEntropyOutput


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    use_token_scaling: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`F.cross_entropy` written out, with soft-capped logits and the z-loss `lse_square_scale * lse**2`.

    The mean divides the cross entropy by the weights of the targets that count, the z-loss by their number.
    Token scaling multiplies both, per row, by the detached probability of the target.
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
    if use_token_scaling:
        probability = torch.softmax(x, 1).gather(1, t[:, None])[:, 0].detach()
        ce, z = ce * probability, z * probability
    predicted = logits[counts].argmax(1)
    right = (predicted == t).float()

    def per_row(values: Tensor, ignored: float) -> Tensor:
        rows = torch.full(target.shape, ignored, dtype=values.dtype, device=x.device)
        return rows.masked_scatter(counts, values)

    if reduction == "none":
        loss, z_loss, accuracy = (per_row(values, 0) for values in (ce + z, z, right))
    else:
        divide = reduction == "mean" and t.numel() > 0
        z_loss = z.sum() / t.numel() if divide else z.sum()
        loss = (ce.sum() / w[t].sum() if divide else ce.sum()) + z_loss
        accuracy = right.mean() if t.numel() > 0 else right.sum()
    if not (return_z_loss or return_token_accuracy or return_predicted_tokens):
        return loss
    return CrossEntropyOutput(
        loss,
        z_loss.detach() if return_z_loss else None,
        accuracy if return_token_accuracy else None,
        per_row(predicted, -1) if return_predicted_tokens else None,
    )
