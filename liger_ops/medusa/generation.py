"""Greedy decoding with Medusa heads: they propose a chain of tokens, the base verifies it in one forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from liger_ops.medusa.model import MedusaModel


@dataclass
class MedusaGeneration:
    """What ``MedusaModel.generate`` returns.

    Attributes:
        sequences: (1, S + new) int64, the prompt and what follows it.
        acceptance_lengths: tokens gained by each forward after the prompt's: one that the base is sure to
            give, and the proposals it agreed with.
    """

    sequences: Tensor
    acceptance_lengths: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per forward, between 1 and one more than there are heads; nan without a forward."""
        lengths = self.acceptance_lengths
        return sum(lengths) / len(lengths) if lengths else float("nan")


@torch.no_grad()
def generate(
    model: MedusaModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None,
    **inputs: Any,
) -> MedusaGeneration:
    """Described at ``MedusaModel.generate``."""
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"generate takes one sequence, (1, S) tokens, got shape {tuple(input_ids.shape)}")
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("attention_mask hides tokens: take the padding out of the one sequence")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    ends = _ends(model, eos_token_id)
    was_training = model.training
    model.eval()
    try:
        return _decode(model, input_ids, attention_mask, max_new_tokens, ends, inputs)
    finally:
        model.train(was_training)


def _decode(
    model: MedusaModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    ends: set[int],
    inputs: dict[str, Any],
) -> MedusaGeneration:
    backbone = model.causal_model.model
    # Without a configuration every layer keeps all positions: one with a sliding window could not take back
    # proposals that pushed others out. The window is in the attention mask.
    cache = DynamicCache()
    outputs = backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **inputs,
    )
    hidden = outputs.last_hidden_state[:, -1:]
    token = model.base_logits(hidden).argmax(-1)
    tokens: list[int] = []
    result = MedusaGeneration(input_ids)
    while len(tokens) < max_new_tokens:
        # `token` is the base's own; what is left to find out is which proposals after it are too.
        if len(tokens) + 1 == max_new_tokens or token.item() in ends:
            tokens.append(token.item())
            break
        proposals = torch.cat([logits.argmax(-1) for logits in model.head_logits(hidden)], dim=1)
        proposals = proposals[:, : max_new_tokens - len(tokens) - 1]
        chain = torch.cat([token, proposals], dim=1)
        outputs = backbone(input_ids=chain, past_key_values=cache, use_cache=True, return_dict=True)
        verified = model.base_logits(outputs.last_hidden_state).argmax(-1)
        agreed = (verified[:, :-1] == proposals).cumprod(dim=1).sum().item()
        gained = chain[0, : 1 + agreed].tolist()
        result.acceptance_lengths.append(len(gained))
        _forget(model, cache, proposals.shape[1] - agreed)
        end = next((i for i, t in enumerate(gained) if t in ends), None)
        if end is not None:
            tokens += gained[: end + 1]
            break
        tokens += gained
        token, hidden = verified[:, agreed : agreed + 1], outputs.last_hidden_state[:, agreed : agreed + 1]
    result.sequences = torch.cat([input_ids, input_ids.new_tensor([tokens])], dim=1)
    return result


def _forget(model: MedusaModel, cache: DynamicCache, count: int) -> None:
    """Take the last ``count`` tokens out of the cache. Keys of images are not among them."""
    if count == 0:
        return
    images = getattr(model.config.get_text_config(), "cross_attention_layers", None) or ()
    for index, layer in enumerate(cache.layers):
        if index not in images and layer.get_seq_length() > 0:
            layer.crop(-count)


def _ends(model: MedusaModel, eos_token_id: int | list[int] | None) -> set[int]:
    if eos_token_id is None:
        settings = getattr(model.causal_model, "generation_config", None)
        eos_token_id = getattr(settings, "eos_token_id", None)
    if eos_token_id is None:
        return set()
    return {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
