"""Medusa's loss in plain PyTorch, with the logits of all heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F


def head(x: torch.Tensor, blocks: Sequence[tuple[torch.Tensor, torch.Tensor]], weight, bias=None):
    """Residual blocks ``x + SiLU(x @ wᵀ + b)``, then the projection to logits."""
    for w, b in blocks:
        x = x + F.silu(x @ w.T + b)
    logits = x @ weight.T
    return logits if bias is None else logits + bias


def losses(
    logits: Sequence[torch.Tensor],
    labels: torch.Tensor,
    num_items: float | None = None,
    first: int = 1,
    cap: float | None = None,
    ignore_index: int = -100,
) -> list[torch.Tensor]:
    """Loss of each head ``i``, whose ``logits`` (B, S, V) at ``t`` predict ``labels[t + 1 + first + i]``.

    Cai et al. 2024, eq. 1. Hidden states and labels are cut, as the paper's code does it.
    """
    result = []
    for i, each in enumerate(logits):
        ahead = 1 + first + i
        kept = each[:, : max(0, labels.shape[1] - ahead)]
        if cap is not None:
            kept = cap * torch.tanh(kept / cap)
        targets = labels[:, ahead:].reshape(-1)
        total = F.cross_entropy(
            kept.reshape(-1, kept.shape[-1]), targets, reduction="sum", ignore_index=ignore_index
        )
        count = (targets != ignore_index).sum() if num_items is None else num_items
        result.append(total / max(1, count))
    return result


def weighed(each: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    return sum(c * loss for c, loss in zip(coefficients, each, strict=True))


def model_loss(
    backbone: Callable[[], torch.Tensor],
    lm_head: torch.nn.Module,
    heads: Sequence[torch.nn.Module],
    labels: torch.Tensor,
    coefficients: Sequence[float],
    stage: int,
    num_items: float | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """The training loss: of the heads on a frozen base (stage 1), or of the base and its heads (stage 2)."""
    if stage == 1:
        with torch.no_grad():
            hidden = backbone()
    else:
        hidden = backbone()
    loss = weighed(losses([h(hidden) for h in heads], labels, num_items, 1, cap), coefficients)
    if stage == 2:
        loss = loss + losses([lm_head(hidden)], labels, num_items, 0, cap)[0]
    return loss
