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
