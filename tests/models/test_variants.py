"""Configurations of every family, patched against unpatched; and records that are wrong, which must show."""

import pytest
import torch
from tiny import MODELS, ROPE, assert_same_gradients, batch, pair, step

VARIANTS = {
    "plain": {},
    "tied": dict(tie_word_embeddings=True),
    "lm_head_bias": dict(lm_head_bias=True),
    "eager_attention": dict(attn_implementation="eager"),
    "multi_query": dict(num_key_value_heads=1),
    "no_grouping": dict(num_key_value_heads=4),
    "odd_sizes": dict(vocab_size=131, hidden_size=40, intermediate_size=50),
}
# mllama has no tied heads; the sizes of the others' heads follow from their rotary sections.
EXCEPT = {("mllama", "tied"), ("mllama_text", "tied"), ("qwen2_vl", "odd_sizes"), ("phi3", "odd_sizes")}
OWN_VARIANTS = {
    "llama": {
        "mlp_bias": dict(mlp_bias=True),
        "attention_bias": dict(attention_bias=True),
        "swish": dict(hidden_act="swish"),
        "gelu": dict(hidden_act="gelu_new"),
        "llama3_rope": dict(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        ),
    },
    "mixtral": {
        "no_router_loss": dict(output_router_logits=False),
        "eager_experts": dict(experts_implementation="eager"),
        "gelu": dict(hidden_act="gelu"),
    },
    "gemma": {"erf_gelu": dict(hidden_act="gelu")},
    "gemma2": {"erf_gelu": dict(hidden_activation="gelu"), "no_softcap": dict(final_logit_softcapping=None)},
    "phi3": {
        "whole_rotary": dict(rope_parameters=ROPE),
        "gelu": dict(hidden_act="gelu"),
        "longrope": dict(
            original_max_position_embeddings=32,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                partial_rotary_factor=0.5,
                short_factor=[1.5, 2.0],
                long_factor=[3.0, 4.0],
                original_max_position_embeddings=32,
            ),
        ),
    },
}


def combinations():
    for family in MODELS:
        for name, changes in (VARIANTS | OWN_VARIANTS.get(family, {})).items():
            if (family, name) not in EXCEPT:
                yield pytest.param(family, changes, id=f"{family}-{name}")


@pytest.mark.parametrize(("family", "changes"), combinations())
def test_logits_loss_and_gradients(family, changes, device):
    model, stock = pair(family, device, **changes)
    inputs = batch(device, family=family)
    loss, gradients = step(model, **inputs)
    stock_loss, stock_gradients = step(stock, **inputs)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, stock_gradients)
    with torch.no_grad():
        out, stock_out = model.eval()(**inputs), stock.eval()(**inputs)
    assert isinstance(out, type(stock_out))
    assert out.keys() == stock_out.keys()
    torch.testing.assert_close(out.logits, stock_out.logits, rtol=1e-4, atol=1e-5)
