import pytest
import torch

from liger_ops.functional import rms_norm
from tests.contract import BadCall, Case, Inputs, OperatorContract
from tests.reference.rms_norm import rms_norm as reference


def normal(*shape, weight=True, **kwargs):
    def make(device, dtype):
        x = torch.randn(shape, device=device, dtype=dtype)
        return Inputs((x, torch.randn(shape[-1], device=device, dtype=dtype) if weight else None), kwargs)

    return make


def float32_weight(device, dtype):
    wide = dtype if dtype == torch.float64 else torch.float32
    return Inputs(
        (torch.randn(6, 64, device=device, dtype=dtype), torch.randn(64, device=device, dtype=wide))
    )


def sliced(device, dtype):
    """Rows of a wider buffer, as a fused projection leaves them."""
    x = torch.randn(2, 5, 96, device=device, dtype=dtype)[..., 32:]
    return Inputs((x, torch.randn(64, device=device, dtype=dtype)))


def misaligned(device, dtype):
    return Inputs(
        (torch.randn(6, 65, device=device, dtype=dtype)[:, 1:], torch.randn(64, device=device, dtype=dtype))
    )


def transposed(device, dtype):
    x = torch.randn(2, 3, 4, 16, device=device, dtype=dtype).transpose(1, 2)
    return Inputs((x, torch.randn(16, device=device, dtype=dtype)))


def strided_weight(device, dtype):
    x = torch.randn(4, 16, device=device, dtype=dtype)
    return Inputs((x, torch.randn(32, device=device, dtype=dtype)[::2]))


def widths(*sizes):
    """One case per register layout of the CUDA kernels: a warp per row up to a block of 1024 threads.

    The worst of many thousand sums of rounded terms is further out than the two roundings of one element.
    """
    return [Case(f"width {n}", normal(7, n), terms=n, roundings=4, small=False) for n in sizes]


class TestRmsNorm(OperatorContract):
    function = staticmethod(rms_norm)
    reference = staticmethod(reference)
    differentiable = (0, 1)
    cases = [
        Case("llama", normal(3, 5, 64), terms=64),
        Case("gemma", normal(3, 5, 64, offset=1.0, casting_mode="gemma"), terms=64),
        Case("none", normal(3, 5, 64, casting_mode="none", eps=1e-3), terms=64),
        Case("no weight", normal(3, 5, 64, weight=False), terms=64),
        Case("float32 weight", float32_weight, terms=64),
        Case("odd width", normal(4, 37), terms=37),
        Case("one row", normal(48), terms=48),
        Case("no rows", normal(0, 16)),
        Case("sliced", sliced, terms=64),
        Case("misaligned rows", misaligned, terms=64),
        Case("transposed", transposed, terms=24),
        Case("strided weight", strided_weight, terms=16),
        # An element of the weight's gradient gathers the rounding errors of a thousand terms.
        Case("many rows", normal(1030, 128), terms=1030, roundings=4, small=False),
        *widths(256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 32776),
    ]
    bad_calls = [
        BadCall(
            "weight size",
            lambda d: Inputs((torch.ones(2, 4, device=d), torch.ones(3, device=d))),
            ValueError,
            r"liger::rms_norm: weight must be 1-D of size 4 \(last dimension of x\), got \[3\]",
        ),
        BadCall(
            "weight rank",
            lambda d: Inputs((torch.ones(2, 4, device=d), torch.ones(1, 4, device=d))),
            ValueError,
            r"liger::rms_norm: weight must be 1-D of size 4 \(last dimension of x\), got \[1, 4\]",
        ),
        BadCall(
            "weight dtype",
            lambda d: Inputs((torch.ones(4, device=d), torch.ones(4, device=d).half())),
            TypeError,
            r"liger::rms_norm: weight must have dtype float32 \(dtype of x\) or float32 beside a 16-bit x, "
            r"got float16",
        ),
        BadCall(
            "integers",
            lambda d: Inputs((torch.ones(4, device=d).int(), None)),
            TypeError,
            r"liger::rms_norm: x must be float64, float32, bfloat16 or float16, got int32",
        ),
        BadCall(
            "0-d",
            lambda d: Inputs((torch.ones((), device=d), None)),
            ValueError,
            r"liger::rms_norm: x must have at least 1 dimension, got shape \[\]",
        ),
        BadCall(
            "mode",
            lambda d: Inputs((torch.ones(4, device=d), None), {"casting_mode": "t5"}),
            ValueError,
            r'liger::rms_norm: casting_mode must be "llama", "gemma" or "none", got "t5"',
        ),
        BadCall(
            "eps",
            lambda d: Inputs((torch.ones(4, device=d), None), {"eps": -1.0}),
            ValueError,
            r"liger::rms_norm: eps must not be negative, got -1",
        ),
    ]

    def make_large(self):
        rows, cols = 2**19 + 5, 4096
        x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
        small = x[-3:].clone().requires_grad_()
        return Inputs((x.requires_grad_(), None)), Inputs((small, None)), lambda t: t[-3:]


def test_devices_must_match():
    with pytest.raises(ValueError, match=r"liger::rms_norm: weight must be on cpu \(device of x\), got meta"):
        rms_norm(torch.ones(4), torch.ones(4, device="meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_points_of_hugging_face(device, dtype):
    """ "llama" gives bit for bit what LlamaRMSNorm gives; "gemma" what GemmaRMSNorm gives."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(64, 256, device=device, dtype=dtype)
    weight = torch.randn(256, device=device, dtype=dtype)
    for module, kwargs in (
        (LlamaRMSNorm(256), {}),
        (GemmaRMSNorm(256), {"offset": 1.0, "casting_mode": "gemma"}),
    ):
        module = module.to(device, dtype)
        module.weight.data.copy_(weight)
        ours = rms_norm(x, weight, 1e-6, **kwargs)
        # The sum of squares may differ in its last bit, which moves a rounding now and then.
        same = (ours == module(x)).float().mean()
        assert same > 0.998, f"{module}: {100 * (1 - same):.2f} % of the elements differ"


def test_width_1(device):
    """One element is its own root mean square: the output is its sign and the gradient cancels."""
    x = torch.tensor([[3.0], [-2.0]], device=device, requires_grad=True)
    y = rms_norm(x, None, 0.0)
    y.backward(torch.full_like(y, 5.0))
    torch.testing.assert_close(y, torch.tensor([[1.0], [-1.0]], device=device))
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-15), (torch.float32, 1e15), (torch.bfloat16, 1e-15), (torch.bfloat16, 1e15)]
    + [(torch.float16, 1e-4), (torch.float16, 1e4)],
)
def test_magnitudes(device, dtype, scale):
    """Rows far from 1, in range of the dtype, keep their relative accuracy."""
    x = (torch.randn(4, 512, device=device).clamp(-6, 6) * scale).to(dtype)
    expected = reference(x.double(), None, 0.0)
    result = rms_norm(x, None, 0.0)
    torch.testing.assert_close(result.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
