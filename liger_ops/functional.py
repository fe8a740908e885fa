"""The operators as documented functions on tensors.

Each function returns what a model uses; the statistics that backward needs stay inside. All of them work
in eager code, under `torch.compile(fullgraph=True)`, `torch.export`, autocast and CUDA graphs, on CPU and
CUDA, for float64, float32, bfloat16 and float16. Sums run in float32 (float64 for float64). Inputs are
never modified, and results are bitwise reproducible from run to run. Second derivatives are not
implemented.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger_ops._library import load

load()

# Looking an overload up costs more than the call; these are looked up once.
_rms_norm = torch.ops.liger.rms_norm.default
_rope = torch.ops.liger.rope.default
_swiglu = torch.ops.liger.swiglu.default
_swiglu_packed = torch.ops.liger.swiglu_packed.default
_geglu = torch.ops.liger.geglu.default
_geglu_packed = torch.ops.liger.geglu_packed.default
_cross_entropy = torch.ops.liger.cross_entropy.default
_fused_linear_cross_entropy = torch.ops.liger.fused_linear_cross_entropy.default


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    r"""Root-mean-square layer normalisation over the last dimension (Zhang and Sennrich, arXiv:1910.07467).

    .. math:: y = \frac{x}{\sqrt{\operatorname{mean}(x^2) + \epsilon}} \cdot (\text{offset} + \text{weight})

    Args:
        x: `[..., hidden]`.
        weight: `[hidden]`, of x's dtype, or float32 beside a 16-bit x. None leaves the scaling out.
        eps: added to the mean square.
        offset: added to the weight; Gemma uses 1.
        casting_mode: the rounding points to reproduce. `"llama"` rounds the normalised x to x's dtype before
            it meets the weight; `"gemma"` and `"none"` compute in float32 and round once.

    Returns:
        `[..., hidden]`, contiguous, of x's dtype.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices do not fit, or casting_mode is unknown.
    """
    return _rms_norm(x, weight, eps, offset, casting_mode)[0]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    r"""Rotary position embedding (Su et al., arXiv:2104.09864) in the half-split form of Hugging Face models.

    With R the width of `cos` and j < R/2, `out[j] = x[j] cos[j] - x[j+R/2] sin[j]` and
    `out[j+R/2] = x[j+R/2] cos[j+R/2] + x[j] sin[j+R/2]`; columns from R on are copied (partial rotary).
    Computed in float32 and rounded once.

    Args:
        q: `[batch, query_heads, positions, head_dim]`, in any memory order.
        k: `[batch, key_heads, positions, head_dim]`; the number of heads may differ (grouped queries).
        cos: `[1 or batch, positions, R]` or `[positions, R]`, R even and at most head_dim, of q's dtype or
            float32. No gradient flows into it.
        sin: as cos.

    Returns:
        The rotated q and k, with the dtypes and memory orders of q and k.

    Raises:
        TypeError: a dtype is not supported, or k's differs from q's.
        ValueError: shapes or devices do not fit.
        NotImplementedError: cos or sin requires a gradient.
    """
    return _rope(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    r"""The SwiGLU gate `silu(gate) * up` (Shazeer, arXiv:2002.05202).

    The activation is rounded to the dtype before the product, as Hugging Face's eager MLP does.

    Args:
        gate: `[..., intermediate]`. Slices of a wider buffer are read in place.
        up: as gate, same shape and dtype.

    Returns:
        `[..., intermediate]`, contiguous.

    Raises:
        TypeError: a dtype is not supported, or up's differs from gate's.
        ValueError: shapes or devices differ.
    """
    return _swiglu(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    r"""`swiglu` of the halves of one buffer: `silu(gate) * up` with `gate, up = gate_up.chunk(2, dim=-1)`.

    For a projection that yields gate and up at once (Phi-3, experts of a mixture). The halves are read in
    place, and the gradient is one buffer: nothing is split or concatenated.

    Args:
        gate_up: `[..., 2 * intermediate]`, gate first.

    Returns:
        `[..., intermediate]`, contiguous.

    Raises:
        TypeError: the dtype is not supported.
        ValueError: the last dimension is odd.
    """
    return _swiglu_packed(gate_up)


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    r"""The GeGLU gate `gelu(gate) * up` (Shazeer, arXiv:2002.05202; GELU: Hendrycks and Gimpel, 1606.08415).

    The activation is rounded to the dtype before the product, as Hugging Face's eager MLP does.

    Args:
        gate: `[..., intermediate]`. Slices of a wider buffer are read in place.
        up: as gate, same shape and dtype.
        approximate: as in `torch.nn.functional.gelu`. `"tanh"` is Hugging Face's `gelu_pytorch_tanh`,
            `0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))`; `"none"` is its `gelu`,
            `0.5 g (1 + erf(g / sqrt(2)))`.

    Returns:
        `[..., intermediate]`, contiguous.

    Raises:
        TypeError: a dtype is not supported, or up's differs from gate's.
        ValueError: shapes or devices differ, or approximate is unknown.
    """
    return _geglu(gate, up, approximate)


def geglu_packed(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    r"""`geglu` of the halves of one buffer: `gelu(gate) * up` with `gate, up = gate_up.chunk(2, dim=-1)`.

    Args:
        gate_up: `[..., 2 * intermediate]`, gate first. Read in place; its gradient is one buffer.
        approximate: `"tanh"` or `"none"`, as in `geglu`.

    Returns:
        `[..., intermediate]`, contiguous.

    Raises:
        TypeError: the dtype is not supported.
        ValueError: the last dimension is odd, or approximate is unknown.
    """
    return _geglu_packed(gate_up, approximate)


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
    r"""Cross entropy of logits with class indices, as `F.cross_entropy` defines it, and more.

    Per row, with `y = softcap * tanh(logits / softcap)` (or the logits), `lse = log(sum(exp(y)))`, class
    weights w and smoothing e,

    .. math::
        (1-e)\, w_t (lse - y_t) + \frac{e}{V} \sum_c w_c (lse - y_c) + \text{lse_square_scale} \cdot lse^2

    The last term is the z-loss of PaLM (Chowdhery et al., arXiv:2204.02311). No float32 copy of 16-bit logits
    is made, forward or backward.

    Args:
        logits: `[tokens, classes]`; rows may be slices of wider ones.
        target: `[tokens]`, int64 class indices, or `ignore_index`.
        weight: `[classes]`, of the logits' dtype, or float32 beside 16-bit logits. Gets no gradient.
        ignore_index: rows with this target have no loss and a gradient of zero.
        reduction: `"mean"` divides by the weight of the targets that count (the z-loss by their number) and
            is 0 when none does; `"sum"`; or `"none"`.
        label_smoothing: e, between 0 and 1.
        lse_square_scale: factor of the z-loss.
        softcap: caps the logits smoothly at this size, as Gemma 2 does.

    Returns:
        float32 (float64 for float64 logits): 0-d, or `[tokens]` for `"none"`.

    Raises:
        TypeError: a dtype is not supported, or the target is not int64.
        ValueError: shapes, devices or options do not fit.
        IndexError: a target is out of range; on CUDA a device-side assertion, as PyTorch has it.
    """
    return _cross_entropy(
        logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction
    )[0]


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
    r"""`cross_entropy(input @ weight.T + bias, target)` without ever holding the logits.

    The rows are taken in chunks: product, loss and the gradients of input, weight and bias, through one
    buffer. For `"mean"` and `"sum"` the gradients are computed along with the loss and multiplied by the
    upstream gradient in backward; for `"none"` backward computes the logits once more. Only gradients that
    somebody asked for are computed. Under autocast the products run in the autocast dtype, and the gradients
    of float32 arguments are not rounded.

    Args:
        input: `[tokens, hidden]`.
        weight: `[classes, hidden]`, of the input's dtype.
        target: `[tokens]`, int64 class indices, or `ignore_index`.
        bias: `[classes]`, of the input's dtype.
        ce_weight: `[classes]`, the class weights of `cross_entropy`.
        ignore_index, reduction, label_smoothing, lse_square_scale, softcap: as in `cross_entropy`.
        num_items: with `"mean"`, what the sum is divided by in place of the number of targets that count: a
            number, or a tensor of one element on any device. It is never read on the host.
        accum_dtype: `torch.float32` accumulates the weight's gradient over the chunks in float32; by default
            in the weight's dtype.
        workspace_bytes: what a call may take beside its results. By default 512 MiB on CUDA; on the CPU a
            quarter of the weight, and 64 MiB at least.

    Returns:
        float32 (float64 for float64 input): 0-d, or `[tokens]` for `"none"`.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes, devices or options do not fit.
        IndexError: a target is out of range; on CUDA a device-side assertion, as PyTorch has it.
    """
    if num_items is not None:
        if isinstance(num_items, Tensor):
            num_items = num_items.to(input.device, non_blocking=True).reshape(())
        else:
            # A fill on the device: copying a number there would wait for it.
            num_items = torch.full((), num_items, device=input.device, dtype=torch.float32)
    return _fused_linear_cross_entropy(
        input,
        weight,
        target,
        bias,
        ce_weight,
        ignore_index,
        label_smoothing,
        lse_square_scale,
        softcap,
        reduction,
        num_items,
        accum_dtype,
        workspace_bytes,
    )[0]
