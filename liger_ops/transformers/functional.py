"""The operators under Liger's function names, argument orders and result dtypes."""

from __future__ import annotations

from collections.abc import Callable

import torch

import liger_ops.functional as LF
from liger_ops.functional import CrossEntropyOutput
from liger_ops.nn._loss_options import in_dtype

__all__ = [
    "CrossEntropyOutput",
    "liger_cross_entropy",
    "liger_fused_add_rms_norm",
    "liger_fused_linear_cross_entropy",
    "liger_geglu",
    "liger_layer_norm",
    "liger_multimodal_rotary_pos_emb",
    "liger_qwen2vl_mrope",
    "liger_rms_norm",
    "liger_rope",
    "liger_rotary_pos_emb",
    "liger_rotary_pos_emb_vision",
    "liger_swiglu",
]


def liger_rms_norm(
    X: torch.Tensor,
    W: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> torch.Tensor:
    """``X / rms(X) · (offset + W)`` over the last dimension, in X's dtype. ``in_place`` changes nothing."""
    return LF.rms_norm(X, W, eps, offset, casting_mode)


def liger_fused_add_rms_norm(
    X: torch.Tensor,
    R: torch.Tensor,
    W: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(liger_rms_norm(S), S)`` with ``S = X + R``, in X's dtype. ``in_place`` changes nothing."""
    return LF.add_rms_norm(X, R, W, eps, offset, casting_mode)


def liger_layer_norm(
    X: torch.Tensor, W: torch.Tensor | None, B: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """``(X - mean(X)) / sqrt(var(X) + eps) · W + B`` over the last dimension, in X's dtype."""
    return LF.layer_norm(X, W, B, eps)


def liger_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of q (B, Hq, S, D) and k (B, Hk, S, D).

    cos and sin are (1 or B, S, R) or (S, R) with R ≤ D and belong to the given rows already, so
    ``position_ids`` is not used. With ``unsqueeze_dim=2`` q and k are (B, S, H, D). ``rotary_dim`` rotates
    fewer columns than R, by the angles in the first ``rotary_dim / 2`` columns of cos and sin. ValueError for
    another ``unsqueeze_dim``, and for a ``rotary_dim`` that is odd or larger than R.
    """
    if rotary_dim is not None and rotary_dim != cos.shape[-1]:
        if rotary_dim % 2 or not 0 < rotary_dim < cos.shape[-1]:
            raise ValueError(
                f"rotary_dim must be even and at most {cos.shape[-1]} (the width of cos), got {rotary_dim}"
            )
        cos, sin = (torch.cat((t[..., : rotary_dim // 2],) * 2, dim=-1) for t in (cos, sin))
    return _heads_at(unsqueeze_dim, LF.rope, q, k, cos, sin)


def _heads_at(
    dim: int,
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    *args,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rotate(q, k, *args)`` for q and k with their heads in dimension ``dim``, 1 or 2."""
    if dim == 1:
        return rotate(q, k, *args)
    if dim == 2:
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *args)
        return q.transpose(1, 2), k.transpose(1, 2)
    raise ValueError(f"unsqueeze_dim must be 1 or 2 (the dimension of the heads), got {dim}")


liger_rotary_pos_emb = liger_rope


def liger_rotary_pos_emb_vision(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of vision patches: q and k (S, H, D), cos and sin (S, D).

    Computed in fp32, returned in the dtype of q and k.
    """

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).unsqueeze(0)

    if cos.dtype != torch.float32 and cos.dtype != q.dtype:
        cos, sin = cos.float(), sin.float()
    q, k = LF.rope(heads_first(q), heads_first(k), cos, sin)
    return q.squeeze(0).transpose(0, 1), k.squeeze(0).transpose(0, 1)


def liger_qwen2vl_mrope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mrope_section: list[int],
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multimodal rotary position embedding of q (B, Hq, S, D) and k (B, Hk, S, D).

    cos and sin are (3, 1 or B, S, D); ``mrope_section`` has the number of pairs that take their angle from
    each of the three. With ``unsqueeze_dim=2`` q and k are (B, S, H, D). ValueError for another
    ``unsqueeze_dim``.
    """
    return _heads_at(unsqueeze_dim, LF.mrope, q, k, cos, sin, mrope_section)


liger_multimodal_rotary_pos_emb = liger_qwen2vl_mrope


def liger_swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``silu(a) · b``."""
    return LF.swiglu(a, b)


def liger_geglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``gelu(a) · b`` with the tanh approximation of GELU, as in Liger."""
    return LF.geglu(a, b, "tanh")


def liger_cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> torch.Tensor | CrossEntropyOutput:
    """Cross entropy of logits (T, V) and int64 targets (T,), in the logits' dtype as ``F.cross_entropy``
    returns it; a ``CrossEntropyOutput`` with one of the ``return_*`` flags.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    result = LF.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
    )
    return in_dtype(result, input.dtype)


def liger_fused_linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ce_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> torch.Tensor | CrossEntropyOutput:
    """Cross entropy of ``input @ weightᵀ + bias`` for input (T, H), weight (V, H), int64 targets (T,); loss
    in fp32. A ``CrossEntropyOutput`` with one of the ``return_*`` flags.
    """
    return LF.fused_linear_cross_entropy(
        input,
        weight,
        target,
        bias,
        ce_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        accum_dtype=accum_dtype,
        use_token_scaling=use_token_scaling,
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
    )
