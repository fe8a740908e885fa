"""Gradients of the norms over more rows than a GPU takes at a time, for every shape of their kernels."""

import pytest
import torch
import torch.nn.functional as F

from liger_ops.functional import add_rms_norm, layer_norm, rms_norm

# Each block has several turns, and the last is not whole.
ROWS = 1031
# A width for each number of threads and vectors, whole and not, and two that are read in loops.
WIDTHS = [64, 128, 256, 512, 896, 1024, 2048, 2304, 4096, 5120, 8192, 16384, 16392, 1001]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def cases():
    """Each operator with its formula: functions of activations, and of vectors as wide as a row."""

    def add_rms(x, residual, weight):
        total = x + residual
        return rms(total, weight), total

    return {
        "rms_norm": (
            lambda x, w: rms_norm(x, w, casting_mode="none"),
            rms,
            1,
            1,
        ),
        "add_rms_norm": (
            lambda x, residual, w: add_rms_norm(x, residual, w, casting_mode="none"),
            add_rms,
            2,
            1,
        ),
        "layer_norm": (
            lambda x, w, b: layer_norm(x, w, b),
            lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
            1,
            2,
        ),
    }


def gradients(function, arguments, upstream):
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [gradient.to(outputs[0].dtype) for gradient in upstream]
    return torch.autograd.grad(outputs, leaves, upstream)


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", cases())
def test_gradients(name, dtype, width):
    operator, formula, activations, vectors = cases()[name]
    generator = torch.Generator("cuda").manual_seed(width)

    def random(*shape):
        # Whole eighths: sums of two are exact in every dtype, so that both sides see the same rows.
        return (torch.randn(shape, generator=generator, device="cuda") * 8).round().div(8).to(dtype)

    arguments = [random(ROWS, width) for _ in range(activations)] + [random(width) for _ in range(vectors)]
    upstream = [random(ROWS, width) for _ in range(activations)]
    actual = gradients(operator, arguments, upstream)
    expected = gradients(formula, [a.double() for a in arguments], upstream)
    for mine, reference in zip(actual, expected, strict=True):
        error = (mine.double() - reference).norm(dim=-1) / reference.norm(dim=-1)
        assert error.max() <= TOLERANCE[dtype]
    again = gradients(operator, arguments, upstream)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
