"""``patch``: what it reports, what it leaves alone, and the way back."""

import gc
import importlib
import inspect
import pickle
import sys
import types
import weakref

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny import CALLS, MODELS, Operators, assert_same_gradients, batch, step, text_model, tiny, twin
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)
from transformers.models.llama import modeling_llama

from liger_ops import transformers as lt
from liger_ops.transformers import PatchReport, apply_liger_kernel_to_llama, patch, patched
from liger_ops.transformers.families import FAMILIES, family_of
from liger_ops.transformers.forwards.blocks import PatchableLayerNorm
from liger_ops.transformers.parts import LayerNorm
from liger_ops.transformers.sites import FLAG


def stock_state():
    """Everything that a patch may touch, and what none may."""
    state = {"LayerNorm": dict(vars(nn.LayerNorm)), "ours": dict(vars(PatchableLayerNorm))}
    for family in FAMILIES:
        modeling = importlib.import_module(family.modeling)
        state[family.name] = {name: value for name, value in vars(modeling).items() if callable(value)}
        for part in family.parts:
            owner = getattr(modeling, part.target, None)
            if isinstance(owner, type):
                state[f"{family.name}.{part.target}"] = dict(vars(owner))
    return state


def assert_identical(state, expected):
    for owner, attributes in expected.items():
        assert state[owner].keys() == attributes.keys(), owner
        for name, value in attributes.items():
            assert state[owner][name] is value, f"{owner}.{name}"


@pytest.fixture(scope="module", autouse=True)
def classes_are_set_up():
    """The first model built sets attributes on its class that transformers caches there."""
    for family in MODELS:
        tiny(family)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Each test here has to undo what it patched, whatever else happened in it."""
    gc.collect()
    before = stock_state()
    yield
    assert_identical(stock_state(), before)


every_family = pytest.mark.parametrize("family", MODELS)


@pytest.fixture
def model():
    return tiny()


def liger_calls(model, family="llama", **arguments):
    with Operators() as operators, torch.no_grad():
        model(**batch(family=family), **arguments)
    return operators.calls


def expected_calls(family):
    return {name: calls for name, calls in CALLS[family].items() if calls} | {"fused_linear_cross_entropy": 1}


def test_records_name_what_transformers_has():
    """A renamed class or function of transformers shows here, not as a patch that does nothing."""
    for family in FAMILIES:
        modeling = pytest.importorskip(family.modeling)
        for part in family.parts:
            # That class is torch's, and only some modules have a name of their own for it.
            assert isinstance(part, LayerNorm) or callable(getattr(modeling, part.target)), part
            assert set(part.model_types) <= set(family.model_types)
        for model_type in family.model_types:
            assert family_of(model_type) is family


@every_family
def test_every_part_of_a_family_applies(family):
    model = tiny(family)
    report = patch(model, strict=True)
    assert not report.skipped
    apt = {part.option for part in family_of(report.model_type).parts if part.fits(model, report.model_type)}
    assert {row.option for row in report.patched} == apt - {"cross_entropy"}
    report.undo()


@every_family
def test_undo_restores_the_same_functions(family):
    model = tiny(family)
    assert not liger_calls(model, family)
    before = stock_state()
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    types_before = [type(module) for module in model.modules()]
    report = patch(model)
    assert liger_calls(model, family) == expected_calls(family)
    report.undo()
    assert_identical(stock_state(), before)
    assert [type(module) for module in model.modules()] == types_before
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
    assert not liger_calls(model, family)
    report.undo()
    assert_identical(stock_state(), before)


def test_undo_of_cross_entropy(model):
    report = patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    assert liger_calls(model)["cross_entropy"] == 1
    report.undo()
    assert "_loss_function" not in vars(model)


def test_context_manager(model):
    with patched(model) as report:
        assert isinstance(report, PatchReport)
        assert liger_calls(model)["rms_norm"]
    assert not liger_calls(model)
    with pytest.raises(RuntimeError, match="inside"), patched(model, rope=False):
        raise RuntimeError("inside")
    assert not liger_calls(model)


@every_family
def test_patch_twice(family):
    model = tiny(family)
    first = patch(model)
    patched_state = stock_state()
    second = patch(model)
    assert_identical(stock_state(), patched_state)
    assert [row.count for row in first.patched] == [row.count for row in second.patched]
    assert all(row.already for row in second.patched)
    assert not any(row.already for row in first.patched)
    assert "patched before" in str(second)
    second.undo()
    assert liger_calls(model, family) == expected_calls(family)
    first.undo()
    assert not liger_calls(model, family)


def test_second_patch_adds_what_the_first_left_out(model):
    first = patch(model, rope=False, swiglu=False, fused_linear_cross_entropy=False)
    assert set(liger_calls(model)) == {"rms_norm"}
    second = patch(model)
    assert set(liger_calls(model)) == {"rms_norm", "rope", "swiglu", "fused_linear_cross_entropy"}
    second.undo()
    assert set(liger_calls(model)) == {"rms_norm"}
    first.undo()


@pytest.mark.parametrize("first", [0, 1])
def test_undo_in_any_order(first):
    models = [tiny(), tiny()]
    reports = [patch(one) for one in models]
    reports[first].undo()
    assert not set(liger_calls(models[first])) & {"rms_norm", "swiglu", "fused_linear_cross_entropy"}
    assert liger_calls(models[1 - first])["rms_norm"] == 5
    reports[1 - first].undo()
    assert not liger_calls(models[1 - first])


@every_family
def test_other_models_are_untouched(family):
    model = tiny(family)
    other = twin(model)
    loss, gradients = step(other, **batch(family=family))
    report = patch(model, rope=False)
    assert not liger_calls(other, family)
    same_loss, same_gradients = step(other, **batch(family=family))
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(gradient, same_gradients[name]) for name, gradient in gradients.items())
    report.undo()
    report = patch(model)
    # The rotary functions are globals of the modeling module.
    assert set(liger_calls(other, family)) == {"rope"}
    torch.testing.assert_close(step(other, **batch(family=family))[0], loss, rtol=1e-6, atol=0)
    report.undo()


def test_rotary_function_is_shared_and_reported(model):
    other = twin(model)
    loss = other(**batch()).loss
    report = patch(model, rms_norm=False, swiglu=False, fused_linear_cross_entropy=False)
    assert set(liger_calls(other)) == {"rope"}
    assert any("apply_rotary_pos_emb" in note for note in report.notes)
    torch.testing.assert_close(other(**batch()).loss, loss, rtol=1e-6, atol=0)
    report.undo()
    assert other(**batch()).loss == loss


def test_nothing_process_wide_is_touched(model):
    from transformers.activations import ACT2CLS
    from transformers.loss.loss_utils import LOSS_MAPPING

    def watched():
        return (
            torch.nn.functional.cross_entropy,
            torch.nn.LayerNorm,
            torch.nn.CrossEntropyLoss,
            dict(LOSS_MAPPING),
            dict(ACT2CLS),
            vars(modeling_llama.LlamaDecoderLayer)["forward"],
            vars(modeling_llama.LlamaAttention)["forward"],
            vars(modeling_llama.LlamaModel)["forward"],
        )

    before = watched()
    for options in ({}, dict(cross_entropy=True, fused_linear_cross_entropy=False)):
        report = patch(model, **options)
        assert watched() == before
        report.undo()


@every_family
def test_exception_half_way_restores_everything(family, monkeypatch):
    """Whichever of the changes fails."""
    from liger_ops.transformers import parts

    acquire = parts._acquire
    model = tiny(family)
    before = stock_state()
    types_before = [type(module) for module in model.modules()]
    changes = 0

    def failing(place, users):
        nonlocal changes
        if changes == 0:
            raise RuntimeError("half-way")
        changes -= 1
        return acquire(place, users)

    report = patch(model)
    count = len(report._reverts)
    report.undo()
    monkeypatch.setattr(parts, "_acquire", failing)
    for last in range(count):
        changes = last
        with pytest.raises(RuntimeError, match="half-way"):
            patch(model)
        assert_identical(stock_state(), before)
        assert [type(module) for module in model.modules()] == types_before
        assert not any(FLAG in vars(module) for module in model.modules())
    assert not liger_calls(model, family)


def test_report_does_not_keep_the_model_alive():
    model = tiny()
    report = patch(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    report.undo()


def test_copy_is_adopted_by_its_own_patch(model):
    first = patch(model)
    copied = twin(model)
    second = patch(copied)
    first.undo()
    assert liger_calls(copied)["rms_norm"] == 5
    second.undo()
    assert not liger_calls(copied)


def test_report_as_table_and_dict(model):
    report = patch(model)
    assert report.summary() == (
        "liger_ops on LlamaForCausalLM (model type llama): rope (apply_rotary_pos_emb x2), "
        "fused_linear_cross_entropy (LlamaForCausalLM x1), rms_norm (LlamaRMSNorm x5), swiglu (LlamaMLP x2)"
    )
    lines = str(report).splitlines()
    assert lines[0] == "liger_ops on LlamaForCausalLM (model type llama)"
    assert ["rms_norm", "LlamaRMSNorm", "5", "liger::rms_norm"] in [line.split() for line in lines]
    columns = {line.index("liger::") for line in lines if "liger::" in line}
    assert len(columns) == 1
    content = report.to_dict()
    assert content["model_type"] == "llama"
    assert {row["option"]: row["count"] for row in content["patched"]} == {
        "rope": 2,
        "fused_linear_cross_entropy": 1,
        "rms_norm": 5,
        "swiglu": 2,
    }
    assert content["skipped"] == []
    report.undo()


def test_options_are_independent(model):
    only = dict(rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=False)
    for option, operator in [
        ("rope", "rope"),
        ("rms_norm", "rms_norm"),
        ("swiglu", "swiglu"),
        ("fused_linear_cross_entropy", "fused_linear_cross_entropy"),
    ]:
        with patched(model, **only | {option: True}):
            assert set(liger_calls(model)) == {operator}
    with patched(model, **only) as report:
        assert not liger_calls(model)
        assert "nothing was patched" in str(report)


def test_unknown_option(model):
    with pytest.raises(TypeError, match="unknown option geglu; the options of llama are rope, cross_entropy"):
        patch(model, geglu=True)
    with pytest.raises(TypeError, match="unknown option ropes"):
        patch(None, model_type="llama", ropes=True)


def test_two_losses_at_once(model):
    with pytest.raises(ValueError, match="two ways to compute the same loss"):
        patch(model, cross_entropy=True)
    with pytest.raises(ValueError, match="two ways to compute the same loss"):
        apply_liger_kernel_to_llama(cross_entropy=True, fused_linear_cross_entropy=True, model=model)


def test_the_other_loss_after_the_first(model):
    fused = patch(model)
    plain = patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    assert [(row.option, row.reason) for row in plain.skipped] == [
        ("cross_entropy", "the model was patched with fused_linear_cross_entropy; undo that first")
    ]
    fused.undo()
    plain = patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    fused = patch(model)
    assert [row.option for row in fused.skipped] == ["fused_linear_cross_entropy"]
    plain.undo()
    fused.undo()


def test_unknown_model_type():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    with pytest.warns(UserWarning, match="model type 'gpt2' is not supported; supported are .*llama"):
        report = patch(model, recognize=False)
    assert not report.patched and report.skipped
    with pytest.raises(ValueError, match="gpt2"):
        patch(model, strict=True, recognize=False)
    with pytest.warns(UserWarning, match="no config.model_type"):
        patch(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="model type 'nonesuch'"):
        patch(None, model_type="nonesuch")


def test_wrong_arguments(model):
    with pytest.raises(TypeError, match="needs a model, or a model_type"):
        patch()
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        patch("llama")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    with pytest.raises(ValueError, match="'gpt2', which is not 'llama'"):
        apply_liger_kernel_to_llama(model=gpt2)


def test_parameters_where_no_operator_runs(model, monkeypatch):
    from liger_ops.transformers import patching

    monkeypatch.setattr(patching, "_has_kernels", lambda device: False)
    with pytest.warns(UserWarning, match="the model is on cpu, and the operators run on cpu and cuda"):
        report = patch(model)
    assert not report.patched
    with pytest.raises(ValueError, match="the model is on cpu"):
        patch(model, strict=True)


def test_activation_decides_not_the_configuration():
    model = tiny(hidden_act="relu")
    report = patch(model)
    assert [(row.option, row.target, row.count, row.reason) for row in report.skipped] == [
        ("swiglu", "LlamaMLP", 2, "the activation is ReLU, not SiLU or GELU")
    ]
    assert "swiglu" not in liger_calls(model)
    assert "skipped: the activation is ReLU" in str(report)
    report.undo()

    model = tiny(hidden_act="gelu")
    model.config.hidden_act = "silu"
    report = patch(model, strict=True)
    assert [row.operator for row in report.patched if row.option == "swiglu"] == ["liger::geglu"]
    assert liger_calls(model)["geglu"] == 2
    report.undo()

    model = tiny()
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    stock = twin(model)
    with pytest.raises(ValueError, match="swiglu on LlamaMLP: the activation is ReLU, not SiLU or GELU"):
        patch(model, strict=True)
    assert not liger_calls(model)
    report = patch(model)
    assert liger_calls(model)["swiglu"] == 1
    torch.testing.assert_close(model(**batch()).loss, stock(**batch()).loss, rtol=1e-5, atol=0)
    report.undo()


def test_activation_changed_after_patching(model):
    report = patch(model)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    assert "swiglu" not in liger_calls(model)
    report.undo()


def test_models_without_a_language_model_head():
    config = tiny().config
    backbone = LlamaModel(config)
    report = patch(backbone)
    assert {row.option for row in report.patched} == {"rope", "rms_norm", "swiglu"}
    assert [row.reason for row in report.skipped] == ["the model has no such module"]
    report.undo()

    classifier = LlamaForSequenceClassification(config)
    report = patch(classifier, cross_entropy=True, fused_linear_cross_entropy=False)
    assert [row.reason for row in report.skipped] == ["LlamaForSequenceClassification has no next-token loss"]
    ids = batch()["input_ids"]
    assert classifier(input_ids=ids, labels=torch.tensor([0, 1])).loss.isfinite()
    report.undo()


def test_signature_is_kept(model):
    stock = inspect.signature(model.forward)
    report = patch(model)
    assert inspect.signature(model.forward) == stock
    assert model.forward.__doc__ == LlamaForCausalLM.forward.__doc__
    report.undo()


def test_subclass_that_overrides_forward_is_left_alone(model):
    class Scaled(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class Renamed(modeling_llama.LlamaRMSNorm):
        pass

    model.model.norm.__class__ = Scaled
    model.model.layers[0].input_layernorm.__class__ = Renamed
    report = patch(model)
    assert [(row.count, row.reason) for row in report.skipped] == [(1, "Scaled overrides forward")]
    assert liger_calls(model)["rms_norm"] == 4
    report.undo()


def test_instance_forward_is_left_alone(model):
    norm = model.model.norm
    norm.forward = types.MethodType(lambda self, x: x, norm)
    report = patch(model)
    assert [row.option for row in report.skipped] == ["rms_norm"]
    assert "forward of its own" in report.skipped[0].reason
    assert liger_calls(model)["rms_norm"] == 4
    report.undo()


def test_replacements_of_others_are_left_alone(model, monkeypatch):
    def forward(self, hidden_states):
        return hidden_states

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return q, k

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    report = patch(model)
    assert {row.option for row in report.skipped} == {"rms_norm", "rope"}
    assert all(row.reason.startswith("replaced by test_patching.") for row in report.skipped)
    report.undo()
    assert vars(modeling_llama.LlamaRMSNorm)["forward"] is forward
    monkeypatch.undo()


def test_undo_leaves_later_replacements(model, caplog):
    dispatcher_user = patch(model)
    dispatcher = vars(modeling_llama.LlamaRMSNorm)["forward"]
    stock = inspect.unwrap(dispatcher)

    def wrapper(self, hidden_states):
        return dispatcher(self, hidden_states)

    modeling_llama.LlamaRMSNorm.forward = wrapper
    dispatcher_user.undo()
    assert "LlamaRMSNorm.forward was replaced by other code" in caplog.text
    assert vars(modeling_llama.LlamaRMSNorm)["forward"] is wrapper
    assert not liger_calls(model)
    modeling_llama.LlamaRMSNorm.forward = stock


def test_custom_loss_function_is_called(model):
    seen = {}

    def doubled(logits, labels, vocab_size, **kwargs):
        seen.update(kwargs, shape=logits.shape)
        return 2 * logits.float().logsumexp(-1).mean()

    model.loss_function = doubled
    report = patch(model)
    assert [(row.option, row.reason) for row in report.skipped] == [
        ("fused_linear_cross_entropy", "loss_function is doubled: it is called, with logits")
    ]
    out = model(**batch(), num_items_in_batch=5)
    assert out.logits is not None
    assert seen["num_items_in_batch"] == 5
    torch.testing.assert_close(out.loss, 2 * out.logits.float().logsumexp(-1).mean())
    report.undo()

    report = patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    assert "loss_function is doubled" in report.skipped[0].reason
    report.undo()
    assert model.loss_function is doubled


def test_accelerate_hook_is_kept(model):
    events = []

    class Recording(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            events.append(type(module).__name__)
            return args, kwargs

    for module in (model, model.model.norm, model.model.layers[0].mlp):
        add_hook_to_module(module, Recording())
    before = model.model.norm._old_forward.__func__
    report = patch(model, strict=True)
    with Operators() as operators:
        step(model, **batch())
    assert operators.calls["rms_norm"] == 5
    assert operators.calls["swiglu"] == 2
    assert operators.calls["fused_linear_cross_entropy"] == 1
    assert sorted(events) == ["LlamaForCausalLM", "LlamaMLP", "LlamaRMSNorm"]
    report.undo()
    assert model.model.norm._old_forward.__func__ is before
    assert not liger_calls(model)


def test_offloaded_model(model):
    stock = twin(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    report = patch(model)
    assert [row.option for row in report.skipped] == ["fused_linear_cross_entropy"]
    assert "Accelerate hook" in report.skipped[0].reason
    with torch.no_grad(), Operators() as operators:
        loss = model(**batch()).loss
        torch.testing.assert_close(loss, stock(**batch()).loss, rtol=1e-5, atol=0)
    assert operators.calls["rms_norm"] == 5
    assert operators.calls["cross_entropy"] == 1
    report.undo()


def test_prepared_by_accelerate(model):
    """Mixed precision captures the model's forward, so patching must come before."""
    from accelerate import Accelerator

    late = twin(model)
    report = patch(model)
    # A second accelerator of the same process shares its state, so one serves both models.
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    with Operators() as operators:
        prepared(**batch()).loss.backward()
    assert operators.calls["fused_linear_cross_entropy"] == 1
    assert not patch(model).skipped
    report.undo()
    assert not liger_calls(prepared)

    accelerator.prepare_model(late)
    report = patch(late)
    assert [row.reason for row in report.skipped] == [
        "prepared by Accelerate already: patch before Accelerator.prepare"
    ]
    report.undo()


@every_family
def test_class_wide(family):
    model_type = tiny(family).config.model_type
    apply = lt.MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    early = tiny(family)
    before = stock_state()
    report = apply()
    late = tiny(family)
    expected = expected_calls(family)
    # torch's own class: for models yet to be built, where their module has a name of its own for it.
    reached = {"mllama": (), "qwen2_vl": (late,)}.get(family, (early, late))
    without = {name: calls for name, calls in expected.items() if name != "layer_norm"}
    for model in (early, late):
        assert liger_calls(model, family) == (expected if model in reached else without)
        assert not any(FLAG in vars(module) for module in model.modules())
    skipped = [(row.option, row.target) for row in report.skipped]
    assert skipped == ([("layer_norm", "LayerNorm")] if family.startswith("mllama") else [])
    assert report.model is None and all(row.count is None for row in report.patched)
    assert "every model" in str(report)
    again = apply()
    assert all(row.already for row in again.patched)
    again.undo()
    assert liger_calls(late, family)
    report.undo()
    assert not liger_calls(early, family)
    assert not liger_calls(late, family)
    assert_identical(stock_state(), before)


def test_class_wide_layer_norm_spares_other_models():
    report = lt.apply_liger_kernel_to_qwen2_vl()
    other = nn.LayerNorm(4)
    assert type(other) is nn.LayerNorm
    norm = tiny("qwen2_vl").model.visual.blocks[0].norm1
    assert isinstance(norm, nn.LayerNorm) and repr(norm).startswith("LayerNorm(")
    one = patch(tiny("qwen2_vl"))
    one.undo()
    report.undo()
    assert type(norm).forward is nn.LayerNorm.forward


def test_layer_norms_of_copies(family="qwen2_vl"):
    model = tiny(family)
    report = patch(model)
    for copied in (twin(model), pickle.loads(pickle.dumps(model))):
        assert liger_calls(copied, family)["layer_norm"] == CALLS[family]["layer_norm"]
        assert copied.load_state_dict(model.state_dict()).missing_keys == []
    report.undo()
    assert not liger_calls(copied, family)
    other = nn.LayerNorm((2, 3))
    other.forward = types.MethodType(lambda self, x: x, other)
    model.model.visual.merger.ln_q = other
    report = patch(model)
    assert [(row.option, row.count) for row in report.skipped] == [("layer_norm", 1)]
    report.undo()


SIGNATURES = {
    "rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu, model": (
        "llama mistral mixtral qwen2 phi3"
    ),
    "rope, cross_entropy, fused_linear_cross_entropy, rms_norm, geglu, model": "gemma gemma2",
    "rope, cross_entropy, fused_linear_cross_entropy, layer_norm, rms_norm, swiglu, model": "mllama",
    "rope, cross_entropy, fused_linear_cross_entropy, rms_norm, layer_norm, swiglu, model": "qwen2_vl",
}


def test_signatures_are_ligers():
    wanted = {name: names for names, families in SIGNATURES.items() for name in families.split()}
    assert wanted.keys() == {family.name for family in FAMILIES}
    for family in FAMILIES:
        parameters = inspect.signature(getattr(lt, f"apply_liger_kernel_to_{family.name}")).parameters
        # Ours comes after Liger's, which may be passed by position.
        assert ", ".join(parameters) == wanted[family.name] + ", lean_activations"
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        assert defaults == family.defaults | {"model": None}


@pytest.mark.parametrize("family", [family for family in MODELS if family != "mllama"])
def test_a_part_of_the_family_without_images(family):
    """The text part of a model that sees has no vision tower, and says so only when asked about it."""
    backbone = text_model(tiny(family))
    report = patch(backbone)
    assert {row.reason for row in report.skipped} <= {"the model has no such module"}
    assert {row.option for row in report.patched} == set(family_of(report.model_type).defaults) - {
        "cross_entropy",
        "fused_linear_cross_entropy",
        "layer_norm",
        "lean_activations",
    }
    report.undo()
    if family == "qwen2_vl":
        report = lt.apply_liger_kernel_to_qwen2_vl(model=backbone)
        assert ("layer_norm", "a qwen2_vl_text model has nothing of the kind") in [
            (row.option, row.reason) for row in report.skipped
        ]
        report.undo()


@every_family
def test_after_peft(family):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    if family == "mixtral":
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(family), config)
    stock = twin(model)
    loss, gradients = step(stock, **batch(family=family))
    report = patch(model, strict=True)
    assert liger_calls(model, family) == expected_calls(family)
    patched_loss, patched_gradients = step(model, **batch(family=family))
    torch.testing.assert_close(patched_loss, loss, rtol=1e-5, atol=0)
    assert_same_gradients(patched_gradients, gradients)
    report.undo()


def test_class_wide_keeps_other_activations():
    report = apply_liger_kernel_to_llama()
    model = tiny(hidden_act="relu")
    assert "swiglu" not in liger_calls(model)
    report.undo()


def test_class_wide_with_compile():
    torch.compiler.reset()
    report = apply_liger_kernel_to_llama()
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch()).loss, model(**batch()).loss)
    report.undo()


def test_class_wide_cross_entropy():
    report = apply_liger_kernel_to_llama(cross_entropy=True, fused_linear_cross_entropy=False)
    model = tiny()
    assert liger_calls(model)["cross_entropy"] == 1
    report.undo()
    assert not liger_calls(model)


def test_class_wide_and_one_model(model):
    one = patch(model)
    everyone = apply_liger_kernel_to_llama()
    other = tiny()
    everyone.undo()
    assert not set(liger_calls(other)) - {"rope"}
    assert liger_calls(model)["rms_norm"] == 5
    one.undo()
    assert not liger_calls(model)


def test_compiled_model_is_looked_through(model):
    compiled = torch.compile(model, backend="eager")
    report = patch(compiled)
    assert report.model == "LlamaForCausalLM"
    report.undo()


def test_import_does_not_import_transformers():
    """The functions and modules are for models of any origin."""
    import subprocess

    code = (
        "import sys, liger_ops.transformers as t; t.liger_rms_norm, t.LigerRMSNorm; "
        "assert 'transformers' not in sys.modules; t.patch; assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_liger_entry_points(model):
    report = lt._apply_liger_kernel_to_instance(model=model, rope=False)
    assert {row.option for row in report.patched} == {"fused_linear_cross_entropy", "rms_norm", "swiglu"}
    report.undo()
    report = lt._apply_liger_kernel("llama", rope=False)
    assert liger_calls(tiny())["rms_norm"] == 5
    report.undo()
    assert lt.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"] is apply_liger_kernel_to_llama
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = lt.nonesuch
    assert set(lt.__all__) <= set(dir(lt))
