from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Two passes over the row: the mean, then the mean square of the deviations."""
    wide = x.double() if x.element_size() == 8 else x.float()
    deviation = wide - wide.mean(-1, keepdim=True)
    y = deviation / (deviation.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)
