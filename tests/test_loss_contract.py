"""The contract on both losses. What is special about each is in a file of its own."""

import functools
import subprocess
import sys

import pytest
import torch

from liger_ops.functional import CrossEntropyOutput, cross_entropy, fused_linear_cross_entropy
from tests.contract import BadCall, Case, Inputs, OperatorContract
from tests.reference.cross_entropy import cross_entropy as cross_entropy_reference
from tests.reference.fused_linear_cross_entropy import fused_linear_cross_entropy as fused_reference

EVERYTHING = {"label_smoothing": 0.2, "lse_square_scale": 1e-2, "softcap": 5.0}
SCALED = {"use_token_scaling": True}
DETAILS = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}


def loss_of(function):
    """The function's one differentiable result; the others are tested in test_loss_options.py."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        return result.loss if isinstance(result, CrossEntropyOutput) else result

    return call


def targets(tokens, classes, device, ignored=0.25):
    target = torch.randint(classes, (tokens,))
    return target.masked_fill(torch.rand(tokens) < ignored, -100).to(device)


def logits(tokens, classes, weight=False, ignored=0.25, scale=1.0, **kwargs):
    def make(device, dtype):
        x = (scale * torch.randn(tokens, classes)).to(device, dtype)
        w = (torch.rand(classes) + 0.1).to(device, dtype) if weight else None
        return Inputs((x, targets(tokens, classes, device, ignored), w), kwargs)

    return make


def sliced_logits(device, dtype):
    """Columns of a padded vocabulary: rows start at odd elements and are further apart than they are long."""
    x = torch.randn(7, 67).to(device, dtype)[:, 3:60]
    return Inputs((x, targets(7, 57, device), None))


def transposed_logits(device, dtype):
    return Inputs((torch.randn(33, 7).to(device, dtype).t(), targets(7, 33, device), None))


class TestCrossEntropy(OperatorContract):
    function = staticmethod(loss_of(cross_entropy))
    reference = staticmethod(loss_of(cross_entropy_reference))
    cases = [
        Case("mean", logits(9, 64), terms=64),
        Case("sum", logits(9, 33, reduction="sum"), terms=33),
        Case("none", logits(9, 33, reduction="none"), terms=33),
        Case("label smoothing", logits(9, 40, label_smoothing=0.1), terms=40),
        Case("z-loss", logits(9, 40, lse_square_scale=1e-2), terms=40),
        Case("softcap", logits(9, 40, softcap=3.0, scale=3.0), terms=40),
        Case("class weights", logits(9, 40, weight=True), terms=40),
        Case("everything", logits(9, 41, weight=True, **EVERYTHING), terms=41),
        Case("token scaling", logits(9, 40, **SCALED), terms=40, total_derivative=False),
        Case(
            "token scaling with everything",
            logits(9, 41, weight=True, **EVERYTHING, **SCALED, **DETAILS),
            terms=41,
            total_derivative=False,
        ),
        Case(
            "token scaling, none",
            logits(9, 33, weight=True, reduction="none", **EVERYTHING, **SCALED, **DETAILS),
            terms=33,
            total_derivative=False,
        ),
        Case("details", logits(9, 64, **DETAILS), terms=64),
        Case("all ignored with details", logits(4, 16, ignored=1.1, **SCALED, **DETAILS)),
        Case("no rows with details", logits(0, 16, **SCALED, **DETAILS)),
        Case("wide with details", logits(5, 32003, **DETAILS), terms=32003, small=False),
        Case("all ignored", logits(4, 16, ignored=1.1)),
        Case("none ignored", logits(4, 16, ignored=-1.0), terms=16),
        Case("one row", logits(1, 50, ignored=-1.0), terms=50),
        Case("no rows", logits(0, 16)),
        Case("sliced", sliced_logits, terms=57),
        Case("transposed", transposed_logits, terms=33),
        Case("wide", logits(5, 32003), terms=32003, small=False),
        Case("wide with everything", logits(5, 32003, weight=True, **EVERYTHING), terms=32003, small=False),
    ]
    bad_calls = [
        BadCall(
            "rank",
            lambda d: Inputs((torch.ones(2, 3, 4, device=d), torch.zeros(2, device=d).long())),
            ValueError,
            r"liger::cross_entropy: logits must be 2-D, got shape \[2, 3, 4\]",
        ),
        BadCall(
            "target dtype",
            lambda d: Inputs((torch.ones(2, 3, device=d), torch.zeros(2, device=d).int())),
            TypeError,
            r"liger::cross_entropy: target must have dtype int64 \(class indices\), got int32",
        ),
        BadCall(
            "target shape",
            lambda d: Inputs((torch.ones(2, 3, device=d), torch.zeros(3, device=d).long())),
            ValueError,
            r"liger::cross_entropy: target must have shape \[2\] \(leading dimensions of logits\), got \[3\]",
        ),
        BadCall(
            "class weights",
            lambda d: Inputs(
                (torch.ones(2, 3, device=d), torch.zeros(2, device=d).long(), torch.ones(4, device=d))
            ),
            ValueError,
            r"liger::cross_entropy: weight must be 1-D of size 3 \(number of classes\), got \[4\]",
        ),
        BadCall(
            "reduction",
            lambda d: Inputs(
                (torch.ones(2, 3, device=d), torch.zeros(2, device=d).long()), {"reduction": "avg"}
            ),
            ValueError,
            r'liger::cross_entropy: reduction must be "mean", "sum" or "none", got "avg"',
        ),
        BadCall(
            "label smoothing",
            lambda d: Inputs(
                (torch.ones(2, 3, device=d), torch.zeros(2, device=d).long()), {"label_smoothing": 1.5}
            ),
            ValueError,
            r"liger::cross_entropy: label_smoothing must be between 0 and 1, got 1.5",
        ),
        BadCall(
            "softcap",
            lambda d: Inputs((torch.ones(2, 3, device=d), torch.zeros(2, device=d).long()), {"softcap": 0.0}),
            ValueError,
            r"liger::cross_entropy: softcap must be positive and finite, or None, got 0",
        ),
        BadCall(
            "class weights need a gradient",
            lambda d: Inputs(
                (
                    torch.ones(2, 3, device=d),
                    torch.zeros(2, device=d).long(),
                    torch.ones(3, device=d, requires_grad=True),
                )
            ),
            NotImplementedError,
            r"liger::cross_entropy: the gradient with respect to weight is not implemented; detach\(\) it",
        ),
    ]

    def make_large(self):
        rows, classes = 2**16 + 3, 2**15 + 5
        x = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
        target = torch.randint(classes, (rows,), device="cuda")
        small = x[-3:].clone().requires_grad_()
        kwargs = {"reduction": "none"}
        large = Inputs((x.requires_grad_(), target, None), kwargs)
        return large, Inputs((small, target[-3:], None), kwargs), lambda t: t[-3:]


def linear(
    tokens=11,
    hidden=16,
    classes=37,
    bias=False,
    weight=False,
    ignored=0.25,
    chunk_rows=None,
    items=None,
    wide_sums=False,
    **kwargs,
):
    """Logits of size about 1, whatever the hidden size. `chunk_rows` bounds the workspace to that many."""

    def make(device, dtype):
        x = torch.randn(tokens, hidden).to(device, dtype)
        head = (torch.randn(classes, hidden) / hidden**0.5).to(device, dtype)
        b = torch.randn(classes).to(device, dtype) if bias else None
        w = (torch.rand(classes) + 0.1).to(device, dtype) if weight else None
        options = dict(kwargs)
        if chunk_rows is not None:
            statistics = 4 * tokens * (8 if dtype == torch.float64 else 4)
            # Rows of the buffer are padded to 128 bytes on CUDA.
            padded = -(-classes * dtype.itemsize // 128) * 128
            options["workspace_bytes"] = statistics + chunk_rows * padded
        if wide_sums and dtype != torch.float64:
            options["accum_dtype"] = torch.float32
        if items is not None:
            options["num_items"] = items(device) if callable(items) else items
        return Inputs((x, head, targets(tokens, classes, device, ignored), b, w), options)

    return make


class TestFusedLinearCrossEntropy(OperatorContract):
    function = staticmethod(loss_of(fused_linear_cross_entropy))
    reference = staticmethod(loss_of(fused_reference))
    differentiable = (0, 1, 3)
    # The logits are rounded to the dtype, which moves each probability; then their gradient is rounded; then
    # the sums. With logits of size up to 3 the first step alone amounts to several roundings.
    cases = [
        Case("mean", linear(), terms=37, roundings=8),
        Case("chunks", linear(tokens=300, chunk_rows=130), terms=300, roundings=8),
        Case("row by row", linear(tokens=5, chunk_rows=1), terms=37, roundings=8),
        Case("bias", linear(bias=True, chunk_rows=4), terms=37, roundings=8),
        Case("sum", linear(reduction="sum", chunk_rows=4), terms=37, roundings=8),
        Case("none", linear(reduction="none", bias=True, chunk_rows=4), terms=37, roundings=8),
        Case("everything", linear(bias=True, weight=True, **EVERYTHING), terms=37, roundings=8),
        Case("number of items", linear(items=5), terms=37, roundings=8),
        Case("tensor of items", linear(items=lambda d: torch.tensor(5, device=d)), terms=37, roundings=8),
        Case("float32 sums", linear(wide_sums=True, chunk_rows=4), terms=37, roundings=8),
        Case("token scaling", linear(chunk_rows=4, **SCALED), terms=37, roundings=8, total_derivative=False),
        Case(
            "token scaling with everything",
            linear(bias=True, weight=True, items=5, chunk_rows=4, **EVERYTHING, **SCALED, **DETAILS),
            terms=37,
            roundings=8,
            total_derivative=False,
        ),
        Case(
            "token scaling, none",
            linear(bias=True, weight=True, reduction="none", chunk_rows=4, **EVERYTHING, **SCALED, **DETAILS),
            terms=37,
            roundings=8,
            total_derivative=False,
        ),
        Case("details", linear(chunk_rows=4, wide_sums=True, **DETAILS), terms=37, roundings=8),
        Case("all ignored with details", linear(ignored=1.1, **SCALED, **DETAILS), terms=37, roundings=8),
        Case("no rows with details", linear(tokens=0, **SCALED, **DETAILS)),
        Case("all ignored", linear(ignored=1.1), terms=37, roundings=8),
        Case("one row", linear(tokens=1, ignored=-1.0), terms=37, roundings=8),
        Case("no rows", linear(tokens=0)),
        Case("wide", linear(tokens=40, hidden=64, classes=10007), terms=10007, roundings=8, small=False),
    ]
    bad_calls = [
        BadCall(
            "hidden size",
            lambda d: Inputs(
                (torch.ones(2, 3, device=d), torch.ones(5, 4, device=d), torch.zeros(2, device=d).long())
            ),
            ValueError,
            r"liger::fused_linear_cross_entropy: weight must",
        ),
        BadCall(
            "dtype of weight",
            lambda d: Inputs(
                (
                    torch.ones(2, 3, device=d),
                    torch.ones(5, 3, device=d).half(),
                    torch.zeros(2, device=d).long(),
                )
            ),
            TypeError,
            r"liger::fused_linear_cross_entropy: weight must have dtype float32",
        ),
        BadCall(
            "target shape",
            lambda d: Inputs(
                (torch.ones(2, 3, device=d), torch.ones(5, 3, device=d), torch.zeros(4, device=d).long())
            ),
            ValueError,
            r"liger::fused_linear_cross_entropy: target must have shape \[2\]",
        ),
        BadCall(
            "bias",
            lambda d: Inputs(
                (
                    torch.ones(2, 3, device=d),
                    torch.ones(5, 3, device=d),
                    torch.zeros(2, device=d).long(),
                    torch.ones(3, device=d),
                )
            ),
            ValueError,
            r"liger::fused_linear_cross_entropy: bias must be 1-D of size 5",
        ),
    ]


OUT_OF_RANGE = """
import torch, liger_ops.functional as LF
x = torch.randn(4, 8, device="cuda")
target = torch.tensor([1, 8, 2, 3], device="cuda")
loss = {call}
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("operator", "call"),
    [
        ("cross_entropy", "LF.cross_entropy(x, target)"),
        ("fused_linear_cross_entropy", "LF.fused_linear_cross_entropy(x, x.T @ x, target)"),
    ],
)
def test_target_out_of_range_on_cuda(operator, call):
    """A device-side assertion ends the process's use of the GPU, so it gets a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", OUT_OF_RANGE.format(call=call)], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert f"liger::{operator}: target must be in [0, classes) or ignore_index" in run.stderr
    # What ends the Python call is the next one to reach the device: ours, or a matrix product.
    assert "device-side assert" in run.stderr or "CUBLAS_STATUS_EXECUTION_FAILED" in run.stderr


@pytest.mark.parametrize("value", [-1, 8, 2**40])
def test_target_out_of_range_on_the_cpu(value):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    target = torch.tensor([1, -100, value, 3])
    for name, call in (
        ("cross_entropy", lambda: cross_entropy(x, target)),
        ("fused_linear_cross_entropy", lambda: fused_linear_cross_entropy(x, weight, target)),
    ):
        with pytest.raises(
            IndexError,
            match=rf"liger::{name}: target must be in \[0, 8\) or ignore_index -100, got {value} at pos.* 2",
        ):
            call()
