"""Token scaling, and what the losses return beside the loss. The contract runs their gradients as well."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from liger_ops.functional import CrossEntropyOutput, cross_entropy, fused_linear_cross_entropy
from tests.reference.cross_entropy import cross_entropy as cross_entropy_reference
from tests.reference.fused_linear_cross_entropy import fused_linear_cross_entropy as fused_reference

DETAILS = dict(return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True)
FIELDS = ("loss", "z_loss", "token_accuracy", "predicted_tokens")
EVERYTHING = dict(label_smoothing=0.2, lse_square_scale=1e-2, softcap=5.0)

# Noise between two ways to round the same numbers.
NO_WORSE = 1.05


def fields(output):
    return [getattr(output, name) for name in FIELDS]


def targets(tokens, classes, device, ignore_index=-100):
    target = torch.randint(classes, (tokens,))
    return target.masked_fill(torch.rand(tokens) < 0.3, ignore_index).to(device)


def predictions(logits):
    """First maximum of each row, NaN being one: what NumPy guarantees."""
    return torch.from_numpy(np.argmax(logits.float().cpu().numpy(), axis=1)).to(logits.device)


def predicted_of(logits, **options):
    """By every path: with and without a gradient, from logits and from a product, plain and not."""
    tokens, classes = logits.shape
    target = torch.zeros(tokens, dtype=torch.long, device=logits.device)
    for plain in ({}, {"softcap": 4.0}, {"label_smoothing": 0.1}):
        for grad in (False, True):
            output = cross_entropy(
                logits.detach().requires_grad_(grad), target, return_predicted_tokens=True, **plain, **options
            )
            yield output.predicted_tokens
            # The identity as input makes the weight the logits, exactly.
            if tokens <= 64:
                eye = torch.eye(tokens, device=logits.device, dtype=logits.dtype).requires_grad_(grad)
                if logits.isfinite().all():
                    yield fused_linear_cross_entropy(
                        eye, logits.t().contiguous(), target, return_predicted_tokens=True, **plain, **options
                    ).predicted_tokens


# -------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "token scaling"])
def test_every_field_of_cross_entropy(device, dtype, reduction, scaled):
    logits = torch.randn(40, 301).to(device, dtype)
    logits[torch.arange(0, 40, 3), 7] = 9.0
    target = targets(40, 301, device)
    target[::3] = 7
    weight = (torch.rand(301) + 0.1).to(device, dtype)
    options = dict(reduction=reduction, use_token_scaling=scaled, **EVERYTHING, **DETAILS)
    ours = cross_entropy(logits, target, weight, **options)
    exact = cross_entropy_reference(logits.double(), target, weight.double(), **options)
    for name, a, e in zip(FIELDS, fields(ours), fields(exact), strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023
    assert (
        ours.loss.dtype == ours.z_loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    )
    assert ours.token_accuracy.dtype == torch.float32 and ours.predicted_tokens.dtype == torch.int64
    assert 0 < ours.token_accuracy.mean() < 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_every_field_of_the_fused_loss(device, reduction, grad, tokens):
    """Also chunk by chunk, a row a chunk, and of classes that are no multiple of a vector."""
    x, head = torch.randn(tokens, 16).to(device), torch.randn(53, 16).to(device)
    bias, weight = torch.randn(53, device=device), torch.rand(53, device=device) + 0.1
    target = targets(tokens, 53, device)
    options = dict(reduction=reduction, use_token_scaling=True, **EVERYTHING, **DETAILS)
    if reduction == "mean":
        options["num_items"] = 9
    exact = fused_reference(x.double(), head.double(), target, bias.double(), weight.double(), **options)
    for workspace in (None, 1):
        ours = fused_linear_cross_entropy(
            x.requires_grad_(grad), head, target, bias, weight, workspace_bytes=workspace, **options
        )
        for a, e in zip(fields(ours), fields(exact), strict=True):
            torch.testing.assert_close(a.detach().double(), e.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_same_with_details(device, reduction):
    logits, target = torch.randn(20, 5003, device=device), targets(20, 5003, device)
    x, head = torch.randn(20, 8, device=device), torch.randn(53, 8, device=device)
    for call in (
        partial(cross_entropy, logits, target),
        partial(fused_linear_cross_entropy, x, head, target % 53),
    ):
        plain = call(reduction=reduction, lse_square_scale=0.1)
        assert isinstance(plain, torch.Tensor)
        for name in DETAILS:
            output = call(reduction=reduction, lse_square_scale=0.1, **{name: True})
            assert isinstance(output, CrossEntropyOutput)
            torch.testing.assert_close(output.loss, plain, rtol=1e-6, atol=0)
            present = [field for field in FIELDS if getattr(output, field) is not None]
            assert present == ["loss", name.removeprefix("return_")]


def test_only_the_loss_has_a_gradient(device):
    logits = torch.randn(5, 30, device=device, requires_grad=True)
    head = torch.randn(7, 30, device=device, requires_grad=True)
    target = torch.tensor([1, -100, 3, 4, 5], device=device)
    for reduction in ("mean", "none"):
        for output in (
            cross_entropy(logits, target, reduction=reduction, **DETAILS),
            fused_linear_cross_entropy(logits, head, target, reduction=reduction, **DETAILS),
        ):
            assert [field.requires_grad for field in fields(output)] == [True, False, False, False]


def test_all_ignored(device):
    logits = torch.randn(3, 8, device=device, requires_grad=True)
    target = torch.full((3,), -100, device=device)
    for reduction in ("mean", "sum"):
        output = cross_entropy(logits, target, reduction=reduction, use_token_scaling=True, **DETAILS)
        assert [f.tolist() for f in fields(output)] == [0.0, 0.0, 0.0, [-1, -1, -1]]
        assert (torch.autograd.grad(output.loss, logits)[0] == 0).all()
    output = cross_entropy(logits, target, reduction="none", **DETAILS)
    assert output.token_accuracy.tolist() == [0.0, 0.0, 0.0]


def test_ignored_rows_are_never_right(device):
    """With ignore_index -1, target and prediction of an ignored row are the same number."""
    logits = torch.eye(4, device=device)
    target = torch.tensor([0, -1, -1, 1], device=device)
    for reduction, accuracy in (("mean", 0.5), ("sum", 0.5), ("none", [1.0, 0.0, 0.0, 0.0])):
        output = cross_entropy(logits, target, ignore_index=-1, reduction=reduction, **DETAILS)
        assert output.token_accuracy.tolist() == accuracy
        assert output.predicted_tokens.tolist() == [0, -1, -1, 3]


# ---------------------------------------------------------------------------------------- predicted tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 7, 8, 33, 1000, 4096, 4097, 9001, 40003])
def test_first_of_equal_logits(device, dtype, classes):
    """Among few different values, the maximum is in many lanes, threads and segments at once."""
    for values in (2, 3, 50):
        logits = torch.randint(values, (6, classes)).to(device, dtype)
        for predicted in predicted_of(logits):
            assert torch.equal(predicted, predictions(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_maximum_anywhere(device, dtype):
    """At every column of a row, whatever the row's alignment."""
    classes = 4203
    columns = torch.cat([torch.arange(70), torch.arange(4060, 4203), torch.tensor([2048, 3000])]).to(device)
    wide = torch.zeros(len(columns), classes + 5, device=device, dtype=dtype)
    logits = wide[:, 3 : 3 + classes]
    logits[torch.arange(len(columns), device=device), columns] = 1
    target = torch.zeros_like(columns)
    for dense in (logits, logits.contiguous()):
        output = cross_entropy(dense, target, return_predicted_tokens=True)
        assert torch.equal(output.predicted_tokens, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_ordinary_maximum(device, dtype):
    """NaN, infinities, and rows of the lowest numbers, as masks leave them."""
    inf, low = torch.inf, torch.finfo(dtype).min
    logits = torch.randn(12, 9001).to(device, dtype)
    logits[0] = -inf
    logits[1] = low
    logits[2], logits[2, 5000] = -inf, low
    logits[3], logits[3, 8000:] = -inf, -3.0
    logits[4, 7000] = torch.nan
    logits[5, [7001, 20, 8999]] = torch.nan
    logits[6] = torch.nan
    logits[7, [6000, 8500]] = inf
    logits[8, 100], logits[8, 6000] = inf, torch.nan
    logits[9, 6000], logits[9, 100] = inf, torch.nan
    logits[10], logits[10, 9000] = -inf, torch.nan
    expected = predictions(logits)
    assert expected[:7].tolist() == [0, 0, 5000, 8000, 7000, 20, 0]
    for predicted in predicted_of(logits):
        assert torch.equal(predicted, expected)


def test_prediction_looks_at_the_logits_themselves(device):
    """Soft-capped, 900 and 1000 are the same number."""
    logits = torch.tensor([[0.0, 900.0, 1000.0, 1000.0]], device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    output = cross_entropy(logits, target, softcap=2.0, return_predicted_tokens=True)
    assert output.predicted_tokens.tolist() == [2]


# ------------------------------------------------------------------------------------------- token scaling


def dynamic_fine_tuning(logits, target, reduction="mean"):
    """The method as eager code has it: losses times their own probabilities, detached."""
    loss = F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), target, reduction="none"
    )
    loss = loss * torch.exp(-loss).detach()
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (target != -100).sum()}[reduction]


def gradients(function, *args, upstream=1.0):
    leaves = [a.detach().clone().requires_grad_() if a.is_floating_point() else a for a in args]
    loss = function(*leaves)
    (loss * upstream).sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def error(result, exact):
    return (result.double() - exact.double()).norm().item() / exact.double().norm().item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_token_scaling_is_no_less_accurate_than_torch(device, reduction, offset):
    logits = (3 * torch.randn(64, 4099) + offset).to(device)
    target = targets(64, 4099, device)
    target[::5] = logits[::5].argmax(1)
    upstream = torch.randn(64, device=device) if reduction == "none" else 0.7
    exact = gradients(
        partial(dynamic_fine_tuning, target=target, reduction=reduction), logits.double(), upstream=upstream
    )
    ours = gradients(
        partial(cross_entropy, target=target, reduction=reduction, use_token_scaling=True),
        logits,
        upstream=upstream,
    )
    torchs = gradients(
        partial(dynamic_fine_tuning, target=target, reduction=reduction), logits, upstream=upstream
    )
    for a, b, e in zip(ours, torchs, exact, strict=True):
        assert error(a, e) <= NO_WORSE * max(error(b, e), torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, 2.0**10])
def test_fused_token_scaling_is_no_less_accurate_than_torch(device, dtype, reduction, upstream):
    x = torch.randn(256, 32).to(device, dtype)
    head = (torch.randn(301, 32) / 2).to(device, dtype)
    target = targets(256, 301, device)
    target[::4] = F.linear(x, head)[::4].argmax(1)
    if reduction == "none":
        upstream = upstream * torch.rand(256, device=device) / 256

    def eager(x, head):
        return dynamic_fine_tuning(F.linear(x, head), target, reduction)

    def fused(x, head):
        return fused_linear_cross_entropy(
            x, head, target, reduction=reduction, use_token_scaling=True, accum_dtype=torch.float32
        )

    exact = gradients(eager, x.double(), head.double(), upstream=upstream)
    ours = gradients(fused, x, head, upstream=upstream)
    eagers = gradients(eager, x, head, upstream=upstream)
    floor = (2 if device == "cuda" else 1) * torch.finfo(torch.float32).eps
    for name, a, b, e in zip(("loss", "dinput", "dweight"), ours, eagers, exact, strict=True):
        assert error(a, e) <= NO_WORSE * max(error(b, e), floor), (
            f"{name}: {error(a, e)}, eager {error(b, e)}"
        )


def test_float16_keeps_unlikely_tokens(device):
    """All tokens as unlikely as at the start of training: p_t * p is below what float16 can hold."""
    x = torch.randn(2048, 32).to(device).half()
    head = (0.05 * torch.randn(4000, 32) / 32**0.5).to(device).half()
    target = torch.randint(4000, (2048,), device=device)
    upstream = 2.0**16
    exact = gradients(partial(dynamic_fine_tuning, target=target), x.double() @ head.double().t())[1]
    exact = upstream * (exact @ head.double())
    for reduction in ("mean", "none"):
        loss = partial(fused_linear_cross_entropy, target=target, reduction=reduction, use_token_scaling=True)
        factor = upstream if reduction == "mean" else upstream / 2048
        assert error(gradients(loss, x, head, upstream=factor)[1], exact) < 1e-3


def test_small_probabilities_keep_their_digits(device):
    """exp(y_t - lse), where 1 + expm1 of it would be rounded to a multiple of 2**-24."""
    logits = torch.zeros(1, 5, device=device)
    logits[0, 1] = 25.0
    target = torch.zeros(1, dtype=torch.long, device=device)
    exact = gradients(partial(dynamic_fine_tuning, target=target), logits.double())
    ours = gradients(partial(cross_entropy, target=target, use_token_scaling=True), logits)
    for a, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "items", [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([[7]], dtype=torch.int32)], ids=repr
)
def test_number_of_items_divides_the_loss_and_not_the_accuracy(device, items):
    x, head = torch.randn(30, 8, device=device), torch.randn(53, 8, device=device)
    target = targets(30, 53, device)
    options = dict(lse_square_scale=0.1, use_token_scaling=True, **DETAILS)
    ours = fused_linear_cross_entropy(x, head, target, num_items=items, **options)
    summed = fused_linear_cross_entropy(x, head, target, reduction="sum", **options)
    torch.testing.assert_close(ours.loss, summed.loss / 7)
    torch.testing.assert_close(ours.z_loss, summed.z_loss / 7)
    assert torch.equal(ours.token_accuracy, summed.token_accuracy)


def test_tied_embedding(device):
    """One parameter as the head and as the embedding: the sum of both gradients."""
    tokens = torch.randint(53, (20,), device=device)
    table = torch.randn(53, 8, device=device, requires_grad=True)
    bias = torch.randn(53, device=device, requires_grad=True)
    target = tokens.roll(-1)
    ours = fused_linear_cross_entropy(
        F.embedding(tokens, table), table, target, bias, use_token_scaling=True, return_z_loss=True
    ).loss
    expected = dynamic_fine_tuning(F.linear(F.embedding(tokens, table), table, bias), target)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (table, bias)), torch.autograd.grad(expected, (table, bias))
    )


def test_strided_arguments(device):
    """Every second row, a transposed head, a column of a table."""
    wide, head = torch.randn(40, 30, device=device), torch.randn(16, 53, device=device)
    table = torch.stack([targets(20, 53, device)] * 2, 1)
    options = dict(reduction="none", use_token_scaling=True, **DETAILS)
    x, weight, target = wide[::2, 7:23], head.t(), table[:, 1]
    strided = fused_linear_cross_entropy(x, weight, target, **options)
    dense = fused_linear_cross_entropy(x.contiguous(), weight.contiguous(), target.contiguous(), **options)
    torch.testing.assert_close(fields(strided), fields(dense))
    logits = torch.randn(53, 40, device=device).t()[::2]
    assert logits.stride() == (2, 40)
    strided, dense = (cross_entropy(t, target, **options) for t in (logits, logits.contiguous()))
    torch.testing.assert_close(fields(strided), fields(dense), rtol=0, atol=0)


# --------------------------------------------------------------------------------------- compiled, and errors


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(device, reduction):
    """With the result object built and returned inside the graph, whatever the number of tokens."""
    options = dict(reduction=reduction, lse_square_scale=0.1, use_token_scaling=True, **DETAILS)
    plain = torch.compile(partial(cross_entropy, **options), fullgraph=True, dynamic=True)
    fused = torch.compile(partial(fused_linear_cross_entropy, **options), fullgraph=True, dynamic=True)
    for tokens in (6, 9):
        x = torch.randn(tokens, 16, device=device, requires_grad=True)
        head = torch.randn(53, 16, device=device, requires_grad=True)
        target = targets(tokens, 16, device)
        for compiled, eager, args in (
            (plain, cross_entropy, (x, target)),
            (fused, fused_linear_cross_entropy, (x, head, target)),
        ):
            actual, expected = compiled(*args), eager(*args, **options)
            torch.testing.assert_close(fields(actual), fields(expected))
            torch.testing.assert_close(
                torch.autograd.grad(actual.loss.sum(), x), torch.autograd.grad(expected.loss.sum(), x)
            )


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, autocast):
    """The options reach the products in the autocast dtype; statistics stay float32."""
    x, head = torch.randn(30, 16, device=device), torch.randn(53, 16, device=device)
    target = targets(30, 53, device)
    options = dict(use_token_scaling=True, lse_square_scale=0.1, **DETAILS)
    with torch.autocast(device, dtype=autocast):
        output = fused_linear_cross_entropy(x, head, target, **options)
    rounded = fused_linear_cross_entropy(x.to(autocast), head.to(autocast), target, **options)
    torch.testing.assert_close(fields(output), fields(rounded), rtol=0, atol=0)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_target_on_another_device(where):
    other = "meta" if where == "cpu" else "cpu"
    x, head = torch.randn(4, 8, device=where), torch.randn(5, 8, device=where)
    target = torch.zeros(4, dtype=torch.long, device=other)
    with pytest.raises(ValueError, match=rf"liger::cross_entropy: target must be on {where}.*, got {other}"):
        cross_entropy(x, target)
    with pytest.raises(
        ValueError, match=rf"liger::fused_linear_cross_entropy: target must be on {where}.*, got {other}"
    ):
        fused_linear_cross_entropy(x, head, target)
