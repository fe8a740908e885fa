"""The operators as documented functions on tensors.

Each function returns what a model uses; the statistics that backward needs stay inside. All of them work
in eager code, under `torch.compile(fullgraph=True)`, `torch.export`, autocast and CUDA graphs, on CPU and
CUDA, for float64, float32, bfloat16 and float16. Sums run in float32 (float64 for float64). Inputs are
never modified, and results are bitwise reproducible from run to run. Second derivatives are not
implemented.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liger_ops._library import load
from liger_ops._numbers import one_number

load()

# Looking an overload up costs more than the call; these are looked up once.
_rms_norm = torch.ops.liger.rms_norm.default
_add_rms_norm = torch.ops.liger.add_rms_norm.default
_layer_norm = torch.ops.liger.layer_norm.default
_rope = torch.ops.liger.rope.default
_mrope = torch.ops.liger.mrope.default
_swiglu = torch.ops.liger.swiglu.default
_geglu = torch.ops.liger.geglu.default
_swiglu_packed = torch.ops.liger.swiglu_packed.default
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

    Rounding:
        Forward as casting_mode says. dx and dweight are computed in float32 from the saved rstd and rounded
        once; with `"llama"`, dweight multiplies dy with the rounded normalised x, as autograd would.

    Saves:
        x, weight, and rstd in float32 (4 bytes a row).

    Moves:
        Forward reads x and writes y. Backward reads dy and x and writes dx; partial sums of dweight add a row
        of float32 for each group of rows.
    """
    return _rms_norm(x, weight, eps, offset, casting_mode)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor]:
    r"""A residual connection and the `rms_norm` after it, in one pass over memory.

    `sum = x + residual`, rounded to the dtype as a separate addition rounds it, and `y = rms_norm(sum)`.
    Backward adds the gradients of both results in float32 and rounds once.
    The gradients of x and residual are one tensor, as those of an addition are.

    Args:
        x: `[..., hidden]`.
        residual: as x, same shape and dtype; it is not broadcast.
        weight, eps, offset, casting_mode: as in `rms_norm`.

    Returns:
        y and sum, `[..., hidden]`, contiguous, of x's dtype.

    Raises:
        TypeError: a dtype is not supported, or residual's differs from x's.
        ValueError: shapes or devices do not fit, or casting_mode is unknown.

    Rounding:
        The sum, then as `rms_norm`. The gradients of sum and of y are added in float32 and rounded once.

    Saves:
        sum, weight, and rstd in float32; neither x nor residual.

    Moves:
        Forward reads x and residual and writes sum and y. Backward reads dy, the gradient of sum and sum, and
        writes one gradient, which x and residual both get.
    """
    y, total, _ = _add_rms_norm(x, residual, weight, eps, offset, casting_mode)
    return y, total


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer normalisation over the last dimension (Ba, Kiros and Hinton, arXiv:1607.06450).

    .. math::
        y = \frac{x - \operatorname{mean}(x)}{\sqrt{\operatorname{var}(x) + \epsilon}} \cdot \text{weight}
        + \text{bias}

    with the variance of the population, as `F.layer_norm` has it. Computed in float32 (float64 for float64)
    and rounded once. A mean that is large beside the deviations costs no accuracy, forward or backward.

    Args:
        x: `[..., hidden]`.
        weight: `[hidden]`, of x's dtype, or float32 beside a 16-bit x. None leaves the scaling out.
        bias: as weight. None adds nothing.
        eps: added to the variance.

    Returns:
        `[..., hidden]`, contiguous, of x's dtype.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices do not fit.

    Rounding:
        The result and each gradient, once. Mean and rstd stay in float32.

    Saves:
        x, weight, and mean and rstd in float32 (8 bytes a row).

    Moves:
        Forward reads x and writes y. Backward reads dy and x and writes dx; partial sums of dweight and dbias
        add two rows of float32 for each group of rows.
    """
    return _layer_norm(x, weight, bias, eps)[0]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    r"""Rotary position embedding (Su et al., arXiv:2104.09864).

    With R the width of `cos`, the columns (a, b) of each of R/2 pairs become
    `out[a] = x[a] cos[a] - x[b] sin[a]` and `out[b] = x[b] cos[b] + x[a] sin[b]`; columns from R on are
    copied (partial rotary). Computed in float32 and rounded once.

    Args:
        q: `[batch, query_heads, positions, head_dim]`, in any memory order.
        k: `[batch, key_heads, positions, head_dim]`; the number of heads may differ (grouped queries).
        cos: `[1 or batch, positions, R]` or `[positions, R]`, R even and at most head_dim, of q's dtype or
            float32. No gradient flows into it.
        sin: as cos.
        interleaved: which columns are a pair: j and j + R/2, as in most Hugging Face models, or the
            neighbours 2j and 2j + 1, as in GPT-J and Cohere.

    Returns:
        The rotated q and k, with the dtypes and memory orders of q and k.

    Raises:
        TypeError: a dtype is not supported, or k's differs from q's.
        ValueError: shapes or devices do not fit.
        NotImplementedError: cos or sin requires a gradient.

    Rounding:
        The result, once. Hugging Face's eager code rounds every product and sum to the dtype.

    Saves:
        cos and sin; neither q nor k.

    Moves:
        Reads and writes q and k once, and cos and sin once a token; backward moves the same.
    """
    return _rope(q, k, cos, sin, interleaved)


def mrope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mrope_section: list[int]) -> tuple[Tensor, Tensor]:
    r"""Multimodal rotary position embedding of Qwen2-VL (Wang et al., arXiv:2409.12191).

    `rope` whose pairs take their angles from three planes, of temporal, height and width positions: the first
    `mrope_section[0]` pairs from plane 0, the next `mrope_section[1]` from plane 1, the rest from plane 2.

    Args:
        q: `[batch, query_heads, positions, head_dim]`, in any memory order.
        k: `[batch, key_heads, positions, head_dim]`.
        cos: `[3, 1 or batch, positions, R]`, of q's dtype or float32. No gradient flows into it.
        sin: as cos.
        mrope_section: three numbers of pairs whose sum is R/2.

    Returns:
        The rotated q and k, with the dtypes and memory orders of q and k.

    Raises:
        TypeError, ValueError, NotImplementedError: as `rope`; ValueError for sections that do not fit.

    Rounding:
        As `rope`.

    Saves:
        cos and sin; neither q nor k.

    Moves:
        As `rope`: of the three planes only the columns that are used are read.
    """
    return _mrope(q, k, cos, sin, mrope_section)


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

    Rounding:
        `silu(gate)`, then the product. The gradients are computed in float32 and rounded once.

    Saves:
        gate and up; the activation is computed again. In the last backward pass their gradients take their
        memory, where nobody else has hold of it.

    Moves:
        Forward reads gate and up and writes the result. Backward reads dout, gate and up and writes dgate and
        dup.
    """
    return _swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    r"""The GeGLU gate `gelu(gate) * up` (Shazeer, arXiv:2002.05202).

    With Phi the normal distribution, `gelu(x) = x Phi(x)` (Hendrycks and Gimpel, arXiv:1606.08415). The tanh
    form replaces `Phi(x)` by `(1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2`.

    Args:
        gate: `[..., intermediate]`. Slices of a wider buffer are read in place.
        up: as gate, same shape and dtype.
        approximate: `"tanh"` (Gemma's `gelu_pytorch_tanh`) or `"none"` (exact), as in `F.gelu`.

    Returns:
        `[..., intermediate]`, contiguous.

    Raises:
        TypeError: a dtype is not supported, or up's differs from gate's.
        ValueError: shapes or devices differ, or approximate is unknown.

    Rounding:
        `gelu(gate)`, then the product. The gradients are computed in float32 and rounded once. Both forms are
        computed without the cancellation of `1 + tanh` and `1 + erf` for negative gates.

    Saves:
        gate and up; the activation is computed again.

    Moves:
        As `swiglu`.
    """
    return _geglu(gate, up, approximate)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    r"""`swiglu` of the halves of one buffer, as a fused projection or a layer of experts yields them.

    Args:
        gate_up: `[..., 2 * intermediate]`: gate, then up. Read in place.

    Returns:
        `[..., intermediate]`, contiguous.

    Raises:
        TypeError: the dtype is not supported.
        ValueError: the last dimension is odd.

    Rounding:
        As `swiglu`.

    Saves:
        gate_up; the activation is computed again.

    Moves:
        As `swiglu`; backward writes one buffer, the gradient of gate_up.
    """
    return _swiglu_packed(gate_up)


def geglu_packed(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    r"""`geglu` of the halves of one buffer, as a fused projection or a layer of experts yields them.

    Args:
        gate_up: `[..., 2 * intermediate]`: gate, then up. Read in place.
        approximate: `"tanh"` or `"none"`, as in `geglu`.

    Returns:
        `[..., intermediate]`, contiguous.

    Raises:
        TypeError: the dtype is not supported.
        ValueError: the last dimension is odd, or approximate is unknown.

    Rounding:
        As `geglu`.

    Saves:
        gate_up; the activation is computed again.

    Moves:
        As `swiglu`; backward writes one buffer, the gradient of gate_up.
    """
    return _geglu_packed(gate_up, approximate)


@dataclass
class CrossEntropyOutput:
    """What `cross_entropy` and `fused_linear_cross_entropy` return when more than the loss is asked for.

    Attributes:
        loss: float32 (float64 for float64 logits), 0-d, or `[tokens]` for reduction `"none"`. The only one
            with a gradient.
        z_loss: the part of the loss that `lse_square_scale` adds, shaped as the loss.
        token_accuracy: float32, whether the predicted token is the target: the mean over the targets that are
            not ignored, 0 when all are; 0 or 1 per token for `"none"`, 0 where the target is ignored.
        predicted_tokens: `[tokens]`, int64, the class with the largest logit, the first of several, a NaN
            being largest as in `torch.argmax`; -1 where the target is ignored.

    What was not asked for is None.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def _cross_entropy_output(
    outputs: tuple[Tensor, ...],
    return_z_loss: bool,
    return_token_accuracy: bool,
    return_predicted_tokens: bool,
) -> Tensor | CrossEntropyOutput:
    loss, z_loss, _, token_accuracy, predicted_tokens = outputs
    if not (return_z_loss or return_token_accuracy or return_predicted_tokens):
        return loss
    return CrossEntropyOutput(
        loss,
        z_loss if return_z_loss else None,
        token_accuracy if return_token_accuracy else None,
        predicted_tokens if return_predicted_tokens else None,
    )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    num_items: Tensor | float | None = None,
    use_token_scaling: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
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
        num_items: with `"mean"`, what the sum is divided by in place of the number of targets that count: a
            number, or a tensor of one element on any device. It is never read on the host.
        use_token_scaling: multiplies each row's loss, z-loss included, by the probability `exp(y_t - lse)` of
            its target, through which no gradient flows: dynamic fine-tuning (Wu et al., arXiv:2508.05629).
            The divisor of the mean stays.
        return_z_loss, return_token_accuracy, return_predicted_tokens: see `CrossEntropyOutput`. They are
            found in the same pass over the logits as the loss.

    Returns:
        float32 (float64 for float64 logits): 0-d, or `[tokens]` for `"none"`. A `CrossEntropyOutput` with one
        of the `return_` options.

    Raises:
        TypeError: a dtype is not supported, or the target is not int64.
        ValueError: shapes, devices or options do not fit.
        IndexError: a target is out of range; on CUDA a device-side assertion, as PyTorch has it.

    Rounding:
        Everything is float32; the gradient is rounded once, to the logits' dtype, and if it was computed in
        forward once more by an upstream gradient that is not a power of two. Where the target's probability
        is near 1, its distance from 1 keeps its digits, and the log-sum-exp of large logits is kept in two
        parts.

    Saves:
        The logits, the target, and two float32 numbers a row (the log-sum-exp); or, in their place, the
        gradient of the logits where it was computed in forward.

    Moves:
        Forward reads the logits once. Backward reads them and writes their gradient.

        A GPU that can keep a row of bfloat16 logits on the chip (an H100 up to 163 840 classes, a multiple of
        8; no `softcap`, `label_smoothing`, predictions, `reduction="none"` or compiled graph) reads them only
        once: forward writes their gradient too, where one is wanted. Backward then reads the upstream
        gradient alone, and multiplies by it in place where it is not 1: give the divisor of a summed loss as
        `num_items` rather than divide afterwards.
    """
    num_items = one_number(num_items, logits.device)
    outputs = _cross_entropy(
        logits,
        target,
        weight,
        ignore_index,
        label_smoothing,
        lse_square_scale,
        softcap,
        reduction,
        num_items,
        use_token_scaling,
        return_token_accuracy,
        return_predicted_tokens,
    )
    return _cross_entropy_output(outputs, return_z_loss, return_token_accuracy, return_predicted_tokens)


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
    use_token_scaling: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
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
        num_items: as in `cross_entropy`.
        accum_dtype: `torch.float32` accumulates the weight's gradient over the chunks in float32; by default
            in the weight's dtype.
        workspace_bytes: what a call may take beside its results. By default 512 MiB on CUDA; on the CPU a
            quarter of the weight, and 64 MiB at least.
        use_token_scaling, return_z_loss, return_token_accuracy, return_predicted_tokens: as in
            `cross_entropy`. They cost a number per token each.

    Returns:
        float32 (float64 for float64 input): 0-d, or `[tokens]` for `"none"`. A `CrossEntropyOutput` with one
        of the `return_` options.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes, devices or options do not fit.
        IndexError: a target is out of range; on CUDA a device-side assertion, as PyTorch has it.

    Rounding:
        The logits of a chunk and their gradient are rounded to the products' dtype; the loss is float32. In
        float16 the gradients of the logits are scaled by a power of two, taken back in float32, so that
        division by the number of tokens does not underflow. The weight's gradient is rounded to its dtype
        after every chunk unless accum_dtype is float32.

    Saves:
        For `"mean"` and `"sum"` the gradients that were asked for, each of its argument's size; for `"none"`
        the arguments, and the log-sum-exp of each token.

    Moves:
        Three matrix products of 2 * tokens * hidden * classes flops (one without gradients; four for `"none"`
        with them), and each chunk of logits: written by its product, read for the loss, replaced by its
        gradient, and read by two products.
    """
    num_items = one_number(num_items, input.device)
    outputs = _fused_linear_cross_entropy(
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
        use_token_scaling,
        return_token_accuracy,
        return_predicted_tokens,
    )
    return _cross_entropy_output(outputs, return_z_loss, return_token_accuracy, return_predicted_tokens)
