"""Medusa heads on the models of every family."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    MODELS,
    Operators,
    assert_same_gradients,
    batch,
    in_dtype_of,
    pair,
    tiny,
    twin,
)

from liger_ops.medusa import MedusaConfig, MedusaModel, add_medusa_heads
from liger_ops.transformers import patch
from tests.reference import medusa as reference

HEADS = 3


def perturbed(model):
    """Heads that are not at their start, where residual blocks do nothing."""
    torch.manual_seed(2)
    for parameter in model.heads.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def medusa(family="llama", device="cpu", stage=1, patched=True, **changes):
    base = tiny(family, device, **changes)
    if patched:
        patch(base, strict=True)
    return perturbed(add_medusa_heads(base, num_heads=HEADS, stage=stage)).train()


def plain_loss(model, inputs, stage, num_items=None):
    """The same model by the reference: an unpatched base, logits of every head, cross entropy."""
    causal = model.causal_model
    backbone = {name: value for name, value in inputs.items() if name != "labels"}
    if stage == 1:
        causal.eval()
    outputs = {}

    def hidden_states():
        outputs.update(causal.model(**backbone, use_cache=False, **extra))
        return outputs["last_hidden_state"]

    mixture = causal.config.model_type == "mixtral"
    extra = dict(output_router_logits=True) if mixture and stage == 2 else {}
    cap = getattr(causal.config, "final_logit_softcapping", None)
    loss = reference.model_loss(
        hidden_states,
        causal.lm_head,
        model.heads,
        inputs["labels"],
        model.medusa_config.coefficients(),
        stage,
        num_items,
        cap,
    )
    if extra:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        balance = load_balancing_loss_func(
            outputs["router_logits"], causal.num_experts, causal.num_experts_per_tok, inputs["attention_mask"]
        )
        loss = loss + causal.router_aux_loss_coef * balance
    return loss


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", MODELS)
def test_loss_and_every_gradient(family, stage, device):
    model = medusa(family, device, stage)
    plain = medusa(family, device, stage, patched=False)
    inputs = in_dtype_of(model, batch(device, family=family))
    with Operators() as operators:
        out = model(**inputs, num_items_in_batch=17)
        out.loss.backward()
    assert operators.calls["fused_linear_cross_entropy"] == HEADS + stage - 1
    assert out.logits is None
    expected = plain_loss(plain, inputs, stage, num_items=17)
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients_of(model), gradients_of(plain))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    # Parts of a vision model that the language model does not reach have no gradient in either.
    assert gradients_of(model).keys() <= trained
    heads = {name for name, _ in model.named_parameters() if name.startswith("heads.")}
    assert heads <= gradients_of(model).keys()
    if stage == 1:
        assert heads == trained


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_ten_training_steps(family, stage, device):
    model = medusa(family, device, stage)
    plain = medusa(family, device, stage, patched=False)
    losses = []
    for each, loss_of in ((model, lambda b: model(**b).loss), (plain, lambda b: plain_loss(plain, b, stage))):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        for seed in range(10):
            loss = loss_of(batch(device, seed, family=family))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        losses[-1].append(loss_of(batch(device, 0, family=family)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # Of random tokens only those seen before can be learned: the first batch, seen again.
    assert losses[0][-1] < losses[0][0]


def test_bfloat16(device):
    model = medusa("llama", device, 2).to(torch.bfloat16)
    plain = medusa("llama", device, 2, patched=False)
    inputs = batch(device)
    out = model(**inputs)
    out.loss.backward()
    expected = plain_loss(plain, inputs, 2)
    expected.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-2)
    rounded = {name: g.float() for name, g in gradients_of(model).items()}
    assert_same_gradients(rounded, gradients_of(plain), share=0.1)
    # Casting a model must not round the weights of its losses.
    assert model.coefficients.dtype == torch.float32
    assert model.coefficients.tolist() == pytest.approx([0.8, 0.64, 0.512], rel=1e-6)


def test_stage_1_builds_no_graph_in_the_base(device):
    """So nothing of it is kept, and the heads get gradients all the same."""
    model = medusa("llama", device)
    assert not model.base.training and model.heads.training
    seen = []
    for module in model.base.modules():
        module.register_forward_hook(lambda m, a, out: seen.append(out))
    model(**batch(device)).loss.backward()
    tensors = [t for out in seen for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    assert len(tensors) > 20 and not any(t.requires_grad for t in tensors)
    assert all(p.grad is None for p in model.base.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.heads.parameters())


def test_switching_stages(device):
    base = tiny("llama", device)
    base.model.embed_tokens.weight.requires_grad_(False)
    model = add_medusa_heads(base, num_heads=2)
    assert not any(p.requires_grad for p in base.parameters())
    model.set_stage(2)
    frozen = {name for name, p in base.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}
    model.set_stage(1)
    assert not any(p.requires_grad for p in base.parameters())
    with pytest.raises(ValueError, match="stage must be 1 .* or 2 .*, got 3"):
        model.set_stage(3)
    with pytest.raises(
        TypeError, match="set_stage cannot change num_heads; the losses' weights are decay, h"
    ):
        model.set_stage(1, num_heads=3)
    model.set_stage(1, decay=0.5, heads_coefficient=2.0)
    assert model.coefficients.tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="no parameter of it required a gradient"):
        add_medusa_heads(tiny("llama", device).requires_grad_(False), stage=2)


def test_head_losses_are_those_of_each_head(device):
    model = medusa("llama", device, 2)
    inputs = batch(device)
    out = model(**inputs)
    hidden = model.causal_model.model(inputs["input_ids"]).last_hidden_state
    each = reference.losses([head(hidden) for head in model.heads], inputs["labels"])
    torch.testing.assert_close(out.head_losses, torch.stack(each))
    base = reference.losses([model.causal_model.lm_head(hidden)], inputs["labels"], first=0)
    torch.testing.assert_close(out.base_loss, torch.stack(base))
    assert not out.head_losses.requires_grad and not out.base_loss.requires_grad
    weighed = out.base_loss[0] + (out.head_losses * model.coefficients).sum()
    torch.testing.assert_close(out.loss, weighed)
    # The Trainer multiplies the loss in place.
    out.loss *= 2
    out.loss.backward()


def test_base_loss_is_the_patched_models_own(device):
    model, _ = pair("llama", device)
    inputs = batch(device)
    alone = model.train()(**inputs).loss
    heads = add_medusa_heads(model, num_heads=2, stage=2).train()
    torch.testing.assert_close(heads(**inputs).base_loss[0], alone)


def test_shift_labels_and_num_items(device):
    model = medusa("llama", device, 2)
    inputs = batch(device)
    labels = inputs.pop("labels")
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = model(**inputs, labels=labels, num_items_in_batch=11).loss
    for items in (11.0, torch.tensor(11), torch.tensor([[11], [11]])):
        got = model(**inputs, shift_labels=shifted, num_items_in_batch=items).loss
        torch.testing.assert_close(got, expected)


def test_schedule(device):
    base = tiny("llama", device)
    model = perturbed(
        add_medusa_heads(base, num_heads=2, stage=2, schedule="linear", schedule_steps=4)
    ).train()
    inputs = batch(device)
    with pytest.raises(RuntimeError, match="linear schedule: give the Trainer a MedusaCallback"):
        model(**inputs)
    for step, factor in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        model.set_step(step)
        out = model(**inputs)
        expected = out.base_loss[0] + factor * (out.head_losses * model.coefficients).sum()
        torch.testing.assert_close(out.loss, expected)
    model.set_step(2)
    assert model.to(torch.float64).ramp == 0.5
    model.eval()
    assert model(**inputs).loss.isfinite()


def test_evaluation_returns_the_bases_logits(device):
    for family in ("llama", "gemma2"):
        model = medusa(family, device).eval()
        inputs = batch(device)
        with torch.no_grad():
            out = model(**inputs)
            expected = model.base(**inputs)
        torch.testing.assert_close(out.logits, expected.logits)
        assert model(**inputs, skip_logits=True).logits is None
        inputs.pop("labels")
        out = model(**inputs)
        assert out.loss is None and out.logits.shape == expected.logits.shape
        assert isinstance(model(**inputs, return_dict=False), tuple)


def test_biased_head(device):
    base = tiny("llama", device, lm_head_bias=True)
    model = perturbed(add_medusa_heads(base, num_heads=2, stage=2)).train()
    inputs = batch(device)
    loss = model(**inputs).loss
    loss.backward()
    got = gradients_of(model)
    assert "heads.1.1.bias" in got and "base.lm_head.bias" in got
    model.zero_grad()
    plain_loss(model, inputs, 2).backward()
    assert_same_gradients(got, gradients_of(model))


def test_deepcopy_and_pickle(device):
    model = medusa("llama", device)
    inputs = batch(device)
    expected = model(**inputs).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**inputs).loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [1, 2])
def test_compiled(stage, device):
    torch.compiler.reset()
    model = medusa("llama", device, stage)
    inputs = batch(device)
    expected = model(**inputs, num_items_in_batch=torch.tensor(7, device=device))
    expected.loss.backward()
    gradients = gradients_of(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(**inputs, num_items_in_batch=torch.tensor(7, device=device))
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.head_losses, expected.head_losses)
    assert_same_gradients(gradients_of(model), gradients)


def test_a_moving_ramp_compiles_once(device):
    torch.compiler.reset()
    base = tiny("llama", device)
    model = add_medusa_heads(base, num_heads=2, schedule="sine", schedule_steps=5).train()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(4):
        model.set_step(step)
        compiled(**batch(device))
    assert counter.frame_count == 1


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(stage, dtype, device):
    model = medusa("llama", device, stage)
    inputs = batch(device)
    with torch.autocast(device, dtype):
        loss = model(**inputs).loss
    (1024 * loss).backward()
    got = {name: g / 1024 for name, g in gradients_of(model).items()}
    model.zero_grad()
    expected = model(**inputs).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert_same_gradients(got, gradients_of(model), share=0.1)


def test_float32_heads_beside_a_16_bit_base(device):
    base = tiny("llama", device, torch.bfloat16)
    model = add_medusa_heads(base, num_heads=2, dtype=torch.float32).train()
    assert {p.dtype for p in model.heads.parameters()} == {torch.float32}
    for cast in (False, True):
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=cast):
            model(**batch(device)).loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.heads.parameters())
    assert model.generate(batch(device)["input_ids"][:1], max_new_tokens=4).sequences.shape[1] <= 16


def test_gradient_checkpointing(device):
    model = medusa("llama", device, 2)
    inputs = batch(device)
    model(**inputs).loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    assert model.is_gradient_checkpointing
    model(**inputs).loss.backward()
    assert_same_gradients(gradients_of(model), expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


# ----------------------------------------------------------------------------------------- saving and loading


def test_heads_are_saved_alone(device, tmp_path):
    model = medusa("llama", device)
    model.save_heads(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "medusa_config.json"}
    loaded = MedusaModel.from_pretrained(tmp_path, twin(model.base)).train()
    assert loaded.medusa_config == model.medusa_config
    inputs = batch(device)
    torch.testing.assert_close(loaded(**inputs).loss, model(**inputs).loss, rtol=0, atol=0)
    heads = sum(p.nbytes for p in model.heads.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < heads + 10_000


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_stage_2_saves_the_trained_base(family, device, tmp_path):
    """Gemma ties its head to the embedding: one tensor under two names."""
    model = medusa(family, device, 2)
    for parameter in model.base.parameters():
        parameter.data.add_(0.01)
    model.save_pretrained(tmp_path)
    loaded = MedusaModel.from_pretrained(tmp_path, tiny(family, device), stage=2).train()
    inputs = batch(device)
    torch.testing.assert_close(loaded(**inputs).loss, model(**inputs).loss, rtol=0, atol=0)
    model.save_heads(tmp_path / "heads")
    alone = MedusaModel.from_pretrained(tmp_path / "heads", tiny(family, device))
    torch.testing.assert_close(alone.heads[0][-1].weight, model.heads[0][-1].weight, rtol=0, atol=0)
    assert not torch.equal(
        alone.causal_model.model.embed_tokens.weight, model.causal_model.model.embed_tokens.weight
    )


def test_heads_of_another_base(device, tmp_path):
    medusa("llama", device).save_heads(tmp_path)
    with pytest.raises(ValueError, match="base with hidden_size 32 instead of 64"):
        MedusaModel.from_pretrained(tmp_path, tiny("llama", device, hidden_size=64))
    with pytest.raises(ValueError, match="base with vocab_size 128 instead of 130"):
        MedusaModel.from_pretrained(tmp_path, tiny("llama", device, vocab_size=130))
    with pytest.raises(ValueError, match="base with model_type 'llama' instead of 'mistral'"):
        MedusaModel.from_pretrained(tmp_path, tiny("mistral", device))
    with pytest.raises(FileNotFoundError, match="holds no Medusa heads"):
        MedusaModel.from_pretrained(tmp_path / "nowhere", tiny("llama", device))
    MedusaConfig(HEADS + 1).save(tmp_path)
    with pytest.raises(
        ValueError, match=r"model.safetensors lacks heads.3.0.linear.bias, .* heads.3.1.weight"
    ):
        MedusaModel.from_pretrained(tmp_path, tiny("llama", device))
    MedusaConfig(HEADS - 1).save(tmp_path)
    with pytest.raises(ValueError, match="holds, but the model has not, heads.2"):
        MedusaModel.from_pretrained(tmp_path, tiny("llama", device))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        MedusaModel.from_pretrained(tmp_path, tiny("llama", device))


def test_bases_that_can_have_no_heads(device):
    with pytest.raises(TypeError, match="base must be a torch.nn.Module, got str"):
        add_medusa_heads("llama")
    with pytest.raises(ValueError, match="known family, got Linear .* known are gemma, gemma2, llama"):
        add_medusa_heads(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaModel has none"):
        add_medusa_heads(tiny("llama", device).model)
    with pytest.raises(TypeError, match="either a config or its fields, got both config and decay"):
        add_medusa_heads(tiny("llama", device), MedusaConfig(), decay=0.5)
    base = tiny("llama", device)
    base.lm_head = torch.nn.Sequential(base.lm_head)
    with pytest.raises(ValueError, match="copies of the base's lm_head, which is a Sequential"):
        add_medusa_heads(base)


# ---------------------------------------------------------------------------------------------- generation


def trained_to_repeat(family, device, **changes):
    """A base and heads that have learned one sequence by heart, so that proposals are accepted."""
    model = add_medusa_heads(tiny(family, device, **changes), num_heads=HEADS, stage=2).train()
    ids = torch.arange(3, 27, device=device).repeat(1, 1)
    extra = {}
    if family == "mllama_text":
        extra["cross_attention_states"] = batch(device, family=family)["cross_attention_states"][:1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(ids, labels=ids, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), ids, extra


@pytest.mark.parametrize("family", [f for f in MODELS if f not in ("mllama", "qwen2_vl")])
def test_generates_what_the_base_generates(family, device):
    # Mistral and Gemma 2 with a window that the text outgrows: proposals are taken back all the same.
    changes = dict(sliding_window=8) if family in ("mistral", "gemma2") else {}
    if family == "gemma2":
        changes["final_logit_softcapping"] = 20.0
    model, ids, extra = trained_to_repeat(family, device, **changes)
    options = dict(max_new_tokens=20, **extra)
    model.causal_model.generation_config.eos_token_id = None
    for start, mask in (
        (ids[:, :4], None),
        (ids[:, 3:10], torch.ones(1, 7, dtype=torch.long, device=device)),
    ):
        got = model.generate(start, mask, **options)
        expected = model.base.generate(
            input_ids=start, attention_mask=torch.ones_like(start), do_sample=False, pad_token_id=0, **options
        )
        assert torch.equal(got.sequences, expected)
        assert sum(got.acceptance_lengths) >= 19
        assert 1 < got.acceptance_length <= HEADS + 1


@pytest.mark.parametrize("family", ["mllama", "qwen2_vl"])
def test_generates_with_images(family, device):
    model = medusa(family, device).eval()
    model.causal_model.generation_config.eos_token_id = None
    inputs = in_dtype_of(model, batch(device, family=family))
    inputs.pop("labels")
    one = {name: value[: len(value) // 2] for name, value in inputs.items()}
    for scale in (0.0, 0.1):
        for parameter in model.heads.parameters():
            parameter.data.add_(scale * torch.randn_like(parameter))
        got = model.generate(**one, max_new_tokens=10)
        expected = model.base.generate(**one, max_new_tokens=10, do_sample=False, pad_token_id=0)
        assert torch.equal(got.sequences, expected)
    # Nothing of the images is left for a text without.
    ids = batch(device)["input_ids"][:1]
    got = model.generate(ids, max_new_tokens=10)
    fresh = medusa(family, device).eval()
    fresh.causal_model.generation_config.eos_token_id = None
    expected = fresh.base.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert torch.equal(got.sequences, expected)


def test_untrained_heads_change_nothing_but_the_speed(device):
    model = medusa("llama", device).eval()
    model.causal_model.generation_config.eos_token_id = None
    for seed in range(4):
        ids = batch(device, seed)["input_ids"][:1]
        for length in (1, 2, 3, 9):
            got = model.generate(ids, max_new_tokens=length)
            expected = model.base.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=0)
            assert torch.equal(got.sequences, expected)


def test_generation_ends_where_the_bases_does(device):
    model, ids, _ = trained_to_repeat("llama", device)
    for end in (9, 12, [10, 11]):
        got = model.generate(ids[:, :4], max_new_tokens=20, eos_token_id=end)
        expected = model.base.generate(
            ids[:, :4], max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=0
        )
        assert torch.equal(got.sequences, expected)
    model.train()
    model.causal_model.generation_config.eos_token_id = 9
    assert model.generate(ids[:, :4], max_new_tokens=20).sequences[0, -1] == 9
    assert model.training


def test_generation_errors(device):
    model = medusa("llama", device)
    ids = batch(device)["input_ids"]
    with pytest.raises(ValueError, match=r"one sequence, \(1, S\) tokens, got shape \(2, 12\)"):
        model.generate(ids)
    with pytest.raises(ValueError, match="max_new_tokens must be positive, got 0"):
        model.generate(ids[:1], max_new_tokens=0)
    with pytest.raises(ValueError, match="attention_mask hides tokens"):
        model.generate(ids[:1], torch.tensor([[0] + [1] * 11], device=device))
