"""The heads themselves: residual blocks, then a projection to the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadTensors(NamedTuple):
    """Parameters of one head: (weight, bias) of each residual block, and of the projection."""

    blocks: tuple[tuple[Tensor, Tensor], ...]
    weight: Tensor
    bias: Tensor | None

    def flat(self) -> list[Tensor | None]:
        return [*(tensor for block in self.blocks for tensor in block), self.weight, self.bias]

    @classmethod
    def of_flat(cls, tensors: list[Tensor | None]) -> HeadTensors:
        *blocks, weight, bias = tensors
        return cls(tuple(zip(blocks[::2], blocks[1::2], strict=True)), weight, bias)


def residual_block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x + SiLU(x @ weightᵀ + bias)`` of (…, H)."""
    return x + F.silu(F.linear(x, weight, bias))


class ResBlock(nn.Module):
    """``x + SiLU(Linear(x))``, the linear layer zero at first, so that the block starts as the identity."""

    def __init__(
        self, hidden_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return residual_block(x, self.linear.weight, self.linear.bias)


class MedusaHeads(nn.ModuleList):
    """``num_heads`` heads, each a ``Sequential`` of ``num_layers`` residual blocks and a ``Linear``.

    Names of tensors are those of the paper's code: ``<head>.<block>.linear.weight`` and, for the projection,
    ``<head>.<num_layers>.weight``.

    Args:
        num_heads, num_layers: as in ``MedusaConfig``.
        weight: (V, H) of the base's head; each projection starts as a copy of it.
        bias: (V,) of the base's head, or None.
        dtype: of the heads' parameters; None takes the weight's.
    """

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        weight: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        vocab_size, hidden_size = weight.shape
        place = dict(device=weight.device, dtype=dtype or weight.dtype)
        for _ in range(num_heads):
            blocks = [ResBlock(hidden_size, **place) for _ in range(num_layers)]
            # On the meta device nothing is initialised, only to be overwritten.
            projection = nn.Linear(
                hidden_size, vocab_size, bias=bias is not None, device="meta", dtype=place["dtype"]
            ).to_empty(device=weight.device)
            with torch.no_grad():
                projection.weight.copy_(weight)
                if bias is not None:
                    projection.bias.copy_(bias)
            self.append(nn.Sequential(*blocks, projection))

    def tensors(self) -> list[HeadTensors]:
        """The parameters of each head, which the fused loss reads instead of calling the modules.

        Raises:
            NotImplementedError: when a layer of a head was replaced, by an adapter for example: what it adds
                would be left out.
        """
        return [_tensors(head, index) for index, head in enumerate(self)]

    def forward(self, hidden_states: Tensor) -> list[Tensor]:
        """Hidden states (…, H) to the logits (…, V) of every head."""
        return [head(hidden_states) for head in self]


def _tensors(head: nn.Sequential, index: int) -> HeadTensors:
    *blocks, projection = head
    for linear in (*(block.linear for block in blocks), projection):
        if type(linear) is not nn.Linear:
            raise NotImplementedError(
                f"head {index} of the Medusa heads has a {type(linear).__name__} in place of a "
                "torch.nn.Linear; exclude the heads from adapters and quantisation"
            )
    residual = tuple((block.linear.weight, block.linear.bias) for block in blocks)
    return HeadTensors(residual, projection.weight, projection.bias)
