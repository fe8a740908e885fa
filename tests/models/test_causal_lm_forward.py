"""The patched head's forward: which labels count, when there are logits, what comes back."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from tiny import BATCH, LENGTH, Operators, assert_same_gradients, batch, step, tiny, twin
from transformers.modeling_outputs import CausalLMOutputWithPast

from liger_ops.transformers import LigerCausalLMOutputWithPast, patch

VOCAB = 128


@pytest.fixture
def stock(device):
    return tiny(device=device)


@pytest.fixture
def model(stock):
    model = twin(stock)
    patch(model, strict=True)
    return model


@pytest.fixture
def inputs(device):
    return batch(device)


def shifted(labels):
    return F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_training_has_no_logits_and_evaluation_has(model, inputs):
    out = model(**inputs)
    assert isinstance(out, CausalLMOutputWithPast)
    assert out.logits is None and out.loss.dtype == torch.float32 and out.loss.shape == ()
    out = model.eval()(**inputs)
    assert out.logits.shape == (BATCH, LENGTH, VOCAB)
    assert out.loss is not None


def test_without_labels(model, stock, inputs):
    del inputs["labels"]
    for mode in (True, False):
        out, expected = model.train(mode)(**inputs), stock.train(mode)(**inputs)
        assert out.loss is None
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("skip_logits", [None, True, False])
def test_skip_logits(model, stock, inputs, training, skip_logits):
    model.train(training)
    out = model(**inputs, skip_logits=skip_logits)
    skipped = training if skip_logits is None else skip_logits
    assert (out.logits is None) == skipped
    close(out.loss, stock(**inputs).loss)


def test_skip_logits_without_labels_returns_logits(model, inputs):
    """The Trainer with label smoothing takes the labels away, asks to skip logits, and then reads them."""
    del inputs["labels"]
    assert model(**inputs, skip_logits=True).logits.shape == (BATCH, LENGTH, VOCAB)


@pytest.mark.parametrize("training", [True, False])
def test_shift_labels_win(model, stock, inputs, device, training):
    model.train(training)
    other = torch.randint(3, VOCAB, (BATCH, LENGTH), device=device)
    loss = model(**inputs, shift_labels=other).loss
    close(loss, stock(**inputs, shift_labels=other).loss)
    assert abs(loss - model(**inputs).loss) > 1e-3


def test_shift_labels_alone(model, stock, inputs):
    labels = inputs.pop("labels")
    expected = stock(**inputs, labels=labels).loss
    out = model(**inputs, shift_labels=shifted(labels))
    close(out.loss, expected)
    assert out.logits is not None
    out = model(**inputs, shift_labels=shifted(labels), skip_logits=True)
    close(out.loss, expected)
    assert out.logits is None


def test_shift_labels_need_not_be_contiguous(model, inputs):
    view = F.pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
    assert not view.is_contiguous()
    close(model(**inputs, shift_labels=view).loss, model(**inputs).loss)


def items(device):
    return {
        "int": 5,
        "float": 5.0,
        "int64": torch.tensor(5, device=device),
        "float32": torch.tensor(5.0, device=device),
        "on_the_cpu": torch.tensor(5),
        "one_element": torch.tensor([5], device=device),
        "expanded": torch.tensor(5, device=device).expand(2, 1),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", items("cpu"))
def test_num_items_in_batch(model, stock, inputs, device, kind, training):
    model.train(training)
    loss, gradients = step(model, **inputs, num_items_in_batch=items(device)[kind])
    stock_loss, stock_gradients = step(stock, **inputs, num_items_in_batch=5)
    assert loss.shape == ()
    close(loss, stock_loss)
    assert_same_gradients(gradients, stock_gradients)


def test_two_micro_batches_make_one_batch(model, stock, inputs):
    count = (inputs["labels"][:, 1:] != -100).sum()
    _, expected = step(stock, **inputs)
    model.zero_grad()
    for row in range(BATCH):
        micro = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        model(**micro, num_items_in_batch=count).loss.backward()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("training", [True, False])
def test_loss_may_be_changed_in_place(model, inputs, training):
    """The Trainer multiplies the loss in place before backward."""
    model.train(training)
    _, expected = step(model, **inputs, num_items_in_batch=3)
    model.zero_grad()
    loss = model(**inputs, num_items_in_batch=3).loss
    loss *= 2
    loss.backward()
    assert_same_gradients({n: p.grad / 2 for n, p in model.named_parameters()}, expected, share=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_all_labels_ignored(model, inputs, training):
    model.train(training)
    inputs["labels"][:] = -100
    loss, gradients = step(model, **inputs)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
    assert model(**inputs, num_items_in_batch=5).loss == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keep", [4, 0, "tensor"])
def test_logits_to_keep_with_labels(model, stock, inputs, device, keep, training):
    """The loss is over the kept positions, and the logits, if any, are theirs."""
    model.train(training)
    positions = list(range(LENGTH)) if keep == 0 else list(range(LENGTH - 4, LENGTH))
    if keep == "tensor":
        positions = [9, 2, 5]
        keep = torch.tensor(positions, device=device)
    out = model(**inputs, logits_to_keep=keep)
    logits = stock(**inputs).logits[:, positions]
    targets = shifted(inputs["labels"])[:, positions]
    close(out.loss, F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1)))
    if not training:
        torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
    # The stock loss wants the caller to cut shifted labels; both forms are accepted.
    close(model(**inputs, logits_to_keep=keep, shift_labels=targets).loss, out.loss)
    close(model(**inputs, logits_to_keep=keep, shift_labels=shifted(inputs["labels"])).loss, out.loss)


def test_logits_to_keep_without_labels(model, stock, inputs):
    del inputs["labels"]
    for keep in (1, 3):
        logits = model(**inputs, logits_to_keep=keep).logits
        assert logits.shape == (BATCH, keep, VOCAB)
        torch.testing.assert_close(logits, stock(**inputs, logits_to_keep=keep).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("through", ["argument", "configuration"])
def test_tuples(model, stock, inputs, through):
    arguments = {}
    if through == "argument":
        arguments["return_dict"] = False
    else:
        model.config.return_dict = False
    expected = stock.eval()(**inputs, return_dict=False)
    loss, logits, cache = model.eval()(**inputs, **arguments)
    close(loss, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-5)
    assert type(cache) is type(expected[2])
    # Without logits, what follows keeps its position.
    loss, logits, cache = model.train()(**inputs, **arguments)
    assert logits is None
    assert type(cache) is type(expected[2])
    without_loss = model(input_ids=inputs["input_ids"], use_cache=False, **arguments)
    assert [tuple(value.shape) for value in without_loss] == [(BATCH, LENGTH, VOCAB)]


def test_arguments_given_as_none(model, stock, inputs):
    """PEFT passes these on explicitly."""
    nothing = dict(inputs_embeds=None, output_attentions=None, output_hidden_states=None, return_dict=None)
    out = model(**inputs, **nothing)
    assert isinstance(out, CausalLMOutputWithPast)
    close(out.loss, stock(**inputs).loss)


def test_positional_arguments(model, stock, inputs):
    names = list(inspect.signature(model.forward).parameters)
    assert names.index("labels") == 5
    arguments = (inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])
    close(model(*arguments).loss, stock(*arguments).loss)


def test_inputs_embeds_and_hidden_states(model, stock, inputs):
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    out = model(inputs_embeds=embeds, **inputs, output_hidden_states=True)
    expected = stock(inputs_embeds=embeds, **inputs, output_hidden_states=True)
    close(out.loss, expected.loss)
    assert len(out.hidden_states) == len(expected.hidden_states)
    for actual, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_attentions(device):
    stock = tiny(device=device, attn_implementation="eager")
    model = twin(stock)
    patch(model)
    out = model(**batch(device), output_attentions=True)
    expected = stock(**batch(device), output_attentions=True)
    for actual, wanted in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_loss_options(model, stock, inputs, training):
    model.train(training)
    targets = shifted(inputs["labels"]).reshape(-1)
    logits = stock(**inputs).logits.reshape(-1, VOCAB)
    close(model(**inputs, label_smoothing=0.1).loss, F.cross_entropy(logits, targets, label_smoothing=0.1))
    ignored = int(targets[targets != -100][0])
    kept = torch.where(targets == -100, ignored, targets)
    inputs["labels"] = torch.where(inputs["labels"] == -100, ignored, inputs["labels"])
    loss = model(**inputs, ignore_index=ignored).loss
    # The padded last position is ignored as well, under whatever index that is.
    kept = kept.view(BATCH, LENGTH)
    kept[:, -1] = ignored
    close(loss, F.cross_entropy(logits, kept.reshape(-1), ignore_index=ignored))


@pytest.mark.parametrize("training", [True, False])
def test_z_loss(model, stock, inputs, training):
    model.train(training)
    targets = shifted(inputs["labels"]).reshape(-1)
    logits = stock(**inputs).logits.reshape(-1, VOCAB)
    kept = targets != -100
    expected = F.cross_entropy(logits, targets) + 0.1 * (logits.logsumexp(-1)[kept] ** 2).mean()
    close(model(**inputs, lse_square_scale=0.1).loss, expected)


def test_accum_dtype(model, stock, inputs):
    for mode in (True, False):
        close(model.train(mode)(**inputs, accum_dtype=torch.float32).loss, stock(**inputs).loss)


@pytest.mark.parametrize("training", [True, False])
def test_token_scaling(model, stock, inputs, training):
    model.train(training)
    targets = shifted(inputs["labels"]).reshape(-1)
    each = F.cross_entropy(stock(**inputs).logits.reshape(-1, VOCAB), targets, reduction="none")
    scaled = (each * torch.exp(-each)).sum()
    close(model(**inputs, use_token_scaling=True).loss, scaled / (targets != -100).sum())
    close(model(**inputs, use_token_scaling=True, num_items_in_batch=7).loss, scaled / 7)


DETAILS = ("token_accuracy", "predicted_tokens", "z_loss")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_items", [None, torch.tensor(7)])
def test_details_of_the_loss(model, stock, inputs, training, num_items):
    model.train(training)
    out = model(
        **inputs,
        lse_square_scale=0.1,
        num_items_in_batch=num_items,
        **{f"return_{name}": True for name in DETAILS},
    )
    assert isinstance(out, LigerCausalLMOutputWithPast)
    targets, logits = shifted(inputs["labels"]), stock(**inputs).logits
    kept = targets != -100
    assert torch.equal(out.predicted_tokens, torch.where(kept, logits.argmax(-1), -1))
    close(out.token_accuracy, (logits.argmax(-1) == targets)[kept].float().mean())
    z = 0.1 * (logits.logsumexp(-1)[kept] ** 2).sum()
    close(out.z_loss, z / (kept.sum() if num_items is None else 7))
    assert out.loss.requires_grad and not out.z_loss.requires_grad


@pytest.mark.parametrize("name", DETAILS)
def test_details_only_when_asked_for(model, inputs, name):
    """The Trainer gathers every field that is not None."""
    for asked in (True, False):
        out = model(**inputs, **{f"return_{name}": asked})
        assert {field for field in DETAILS if field in out} == ({name} if asked else set())
    plain = model.eval()(**inputs, return_dict=False)
    values = model(**inputs, return_dict=False, **{f"return_{name}": True})
    assert len(values) == len(plain) + 1
    assert torch.equal(values[-1], model(**inputs, **{f"return_{name}": True})[name])
    del inputs["labels"]
    assert name not in model(**inputs, **{f"return_{name}": True})


def test_details_with_the_users_own_loss(model, inputs):
    """Whatever that function makes of the options, the forward has a loss and nothing else."""
    model.loss_function = lambda logits, labels, **kwargs: logits.float().mean()
    out = model(**inputs, return_token_accuracy=True)
    assert out.loss is not None and "token_accuracy" not in out


def test_details_where_only_the_loss_function_is_patched(stock, inputs):
    """The stock forward has no place for them, and gets a plain loss."""
    expected = stock(**inputs).loss
    patch(
        stock, cross_entropy=True, fused_linear_cross_entropy=False, rope=False, rms_norm=False, swiglu=False
    )
    out = stock(**inputs, return_token_accuracy=True)
    assert isinstance(out.loss, torch.Tensor)
    close(out.loss, expected)


def test_evaluation_loss_makes_no_float_copy_of_the_logits(device):
    """transformers' loss upcasts all logits; ours takes them as they are."""
    model = tiny(device=device, dtype=torch.bfloat16)
    stock = twin(model)
    patch(model)
    with Operators() as operators, torch.no_grad():
        out = model.eval()(**batch(device))
    assert operators.calls["cross_entropy"] == 1
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, stock.eval()(**batch(device)).loss, rtol=5e-3, atol=0)


def test_labels_out_of_range(model, inputs):
    if inputs["labels"].device.type != "cpu":
        pytest.skip("a device-side assertion on CUDA ends the process's context")
    inputs["labels"][0, 5] = VOCAB
    for mode in (True, False):
        with pytest.raises(IndexError):
            model.train(mode)(**inputs)


def test_cache_in_decoding(model, stock, inputs):
    ids = inputs["input_ids"]
    model.eval(), stock.eval()
    first = model(input_ids=ids[:, :8], use_cache=True)
    second = model(input_ids=ids[:, 8:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, stock(input_ids=ids).logits[:, 8:], rtol=1e-4, atol=1e-5)
