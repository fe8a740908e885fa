import pytest
import torch

from liger_ops.functional import mrope, rope
from tests.contract import BadCall, Case, Inputs, OperatorContract
from tests.reference.rope import mrope as mrope_reference
from tests.reference.rope import rope as reference


def angles(device, dtype, *shape):
    """Like a model's: the two halves of the width hold the same angle."""
    angle = torch.randn(*shape[:-1], shape[-1] // 2, device=device).repeat_interleave(1, -1)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def model_layout(
    q_heads=4, k_heads=2, positions=6, head_dim=32, rotary_dim=None, batch=2, angle_batch=1, angle_dtype=None
):
    """Projections viewed as heads and transposed, which is what attention layers pass."""

    def make(device, dtype):
        def heads(n):
            return torch.randn(batch, positions, n, head_dim, device=device, dtype=dtype).transpose(1, 2)

        width = head_dim if rotary_dim is None else rotary_dim
        wide = angle_dtype if dtype != torch.float64 else None
        cos_sin = angles(device, wide or dtype, angle_batch, positions, width)
        return Inputs((heads(q_heads), heads(k_heads), *cos_sin))

    return make


def row_major(device, dtype):
    q = torch.randn(2, 3, 5, 16, device=device, dtype=dtype)
    return Inputs((q, torch.randn(2, 1, 5, 16, device=device, dtype=dtype), *angles(device, dtype, 2, 5, 16)))


def slices_of_fused_projection(device, dtype):
    """Phi-3 splits one projection into q, k and v: the position stride is wider than the heads."""
    qkv = torch.randn(2, 6, (4 + 2 + 2) * 16, device=device, dtype=dtype)
    q, k, _ = qkv.split([64, 32, 32], dim=-1)
    return Inputs(
        (
            q.view(2, 6, 4, 16).transpose(1, 2),
            k.view(2, 6, 2, 16).transpose(1, 2),
            *angles(device, dtype, 1, 6, 16),
        )
    )


def two_dimensional_angles(device, dtype):
    q = torch.randn(2, 3, 5, 16, device=device, dtype=dtype)
    k = torch.randn(2, 3, 5, 16, device=device, dtype=dtype)
    return Inputs((q, k, *angles(device, dtype, 5, 16)))


def unequal_halves(device, dtype):
    """cos and sin are read in full width: nothing says that their halves agree."""
    q = torch.randn(1, 2, 4, 16, device=device, dtype=dtype)
    k = torch.randn(1, 2, 4, 16, device=device, dtype=dtype)
    cos, sin = torch.randn(2, 1, 4, 16, device=device, dtype=dtype)
    return Inputs((q, k, cos, sin))


def transposed_head_dim(device, dtype):
    q = torch.randn(2, 2, 16, 5, device=device, dtype=dtype).transpose(2, 3)
    k = torch.randn(2, 2, 16, 5, device=device, dtype=dtype).transpose(2, 3)
    return Inputs((q, k, *angles(device, dtype, 1, 5, 16)))


def expanded_heads(device, dtype):
    q = torch.randn(2, 1, 5, 16, device=device, dtype=dtype).expand(2, 3, 5, 16)
    return Inputs((q, torch.randn(2, 1, 5, 16, device=device, dtype=dtype), *angles(device, dtype, 1, 5, 16)))


def interleaved(make):
    """The same call with neighbouring columns as pairs, each of one angle."""

    def interleave(t):
        return t[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1)

    def make_interleaved(device, dtype):
        q, k, cos, sin = make(device, dtype).args
        return Inputs((q, k, interleave(cos), interleave(sin)), {"interleaved": True})

    return make_interleaved


def unequal_neighbours(device, dtype):
    inputs = unequal_halves(device, dtype)
    return Inputs(inputs.args, {"interleaved": True})


def at_odd_address(make):
    """q, k, cos and sin one element past an aligned address."""

    def shifted(t):
        if t is None:
            return None
        buffer = torch.empty(t.numel() + 1, device=t.device, dtype=t.dtype)
        return buffer[1:].view(t.shape).copy_(t)

    def make_shifted(device, dtype):
        inputs = make(device, dtype)
        return Inputs(tuple(map(shifted, inputs.args)), inputs.kwargs)

    return make_shifted


def large_case(with_planes, kwargs):
    """More than 2**31 elements of q, and a small call on its last positions."""
    positions, dim, last = 2**17 + 3, 128, 3
    q = torch.randn(1, positions, 128, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k = torch.randn(1, positions, 1, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    cos_sin = [with_planes(a) for a in angles("cuda", torch.bfloat16, 1, positions, dim)]

    def ending(t):
        return t[..., -last:, :]

    large = Inputs((q.requires_grad_(), k.requires_grad_(), *cos_sin), kwargs)
    small = Inputs((*(ending(t.detach()).requires_grad_() for t in (q, k)), *map(ending, cos_sin)), kwargs)
    return large, small, ending


class TestRope(OperatorContract):
    function = staticmethod(rope)
    reference = staticmethod(reference)
    differentiable = (0, 1)
    cases = [
        Case("model layout", model_layout(), terms=2),
        Case("batch of angles", model_layout(angle_batch=2), terms=2),
        Case("float32 angles", model_layout(angle_dtype=torch.float32), terms=2),
        Case("partial rotary", model_layout(rotary_dim=16), terms=2),
        Case("odd half", model_layout(head_dim=20, rotary_dim=10), terms=2),
        Case("more key heads", model_layout(q_heads=1, k_heads=3), terms=2),
        Case("one position", model_layout(positions=1), terms=2),
        Case("no positions", model_layout(positions=0), terms=2),
        Case("row major", row_major, terms=2),
        Case("slices of a fused projection", slices_of_fused_projection, terms=2),
        Case("two-dimensional angles", two_dimensional_angles, terms=2),
        Case("unequal halves", unequal_halves, terms=2),
        Case("transposed head_dim", transposed_head_dim, terms=2),
        Case("odd address", at_odd_address(model_layout()), terms=2),
        Case("interleaved", interleaved(model_layout()), terms=2),
        Case("interleaved, float32 angles", interleaved(model_layout(angle_dtype=torch.float32)), terms=2),
        Case(
            "interleaved, partial, odd half", interleaved(model_layout(head_dim=20, rotary_dim=10)), terms=2
        ),
        Case("interleaved, unequal neighbours", unequal_neighbours, terms=2),
        Case("interleaved, odd address", at_odd_address(interleaved(model_layout())), terms=2),
        Case("head_dim 128", model_layout(32, 8, 9, 128), terms=2, small=False),
        Case("interleaved, head_dim 128", interleaved(model_layout(32, 8, 9, 128)), terms=2, small=False),
        Case("wide head", model_layout(2, 1, 5, 2304), terms=2, small=False),
    ]
    bad_calls = [
        BadCall(
            "rank",
            lambda d: Inputs((torch.ones(2, 4, 8, device=d),) * 4),
            ValueError,
            r"liger::rope: q must be 4-D, got shape \[2, 4, 8\]",
        ),
        BadCall(
            "positions of k",
            lambda d: Inputs(
                (
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 2, 3, 8, device=d),
                    torch.ones(1, 4, 8, device=d),
                    torch.ones(1, 4, 8, device=d),
                )
            ),
            ValueError,
            r"liger::rope: k must have shape \[1, heads, 4, 8\] \(batch, positions and head_dim of q\), "
            r"got \[1, 2, 3, 8\]",
        ),
        BadCall(
            "dtype of k",
            lambda d: Inputs(
                (
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 2, 4, 8, device=d).half(),
                    torch.ones(1, 4, 8, device=d),
                    torch.ones(1, 4, 8, device=d),
                )
            ),
            TypeError,
            r"liger::rope: k must have dtype float32 \(dtype of q\), got float16",
        ),
        BadCall(
            "positions of cos",
            lambda d: Inputs(
                (
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 5, 8, device=d),
                    torch.ones(1, 5, 8, device=d),
                )
            ),
            ValueError,
            r"liger::rope: cos must have shape \[1 or 1, 4, rotary_dim\] or \[4, rotary_dim\]",
        ),
        BadCall(
            "rotary width",
            lambda d: Inputs(
                (
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 4, 10, device=d),
                    torch.ones(1, 4, 10, device=d),
                )
            ),
            ValueError,
            r"liger::rope: the last dimension of cos must be even and at most head_dim 8, got 10",
        ),
        BadCall(
            "odd rotary width",
            lambda d: Inputs(
                (
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 4, 7, device=d),
                    torch.ones(1, 4, 7, device=d),
                )
            ),
            ValueError,
            r"liger::rope: the last dimension of cos must be even and at most head_dim 8, got 7",
        ),
        BadCall(
            "sin unlike cos",
            lambda d: Inputs(
                (
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 4, 8, device=d),
                    torch.ones(1, 4, 6, device=d),
                )
            ),
            ValueError,
            r"liger::rope: sin must have shape \[1, 4, 8\] \(shape of cos\), got \[1, 4, 6\]",
        ),
        BadCall(
            "cos needs a gradient",
            lambda d: Inputs(
                (
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 2, 4, 8, device=d),
                    torch.ones(1, 4, 8, device=d, requires_grad=True),
                    torch.ones(1, 4, 8, device=d),
                )
            ),
            NotImplementedError,
            r"liger::rope: gradients with respect to cos and sin are not implemented; detach\(\) them",
        ),
    ]

    def make_large(self):
        return large_case(lambda angle: angle, {})


def three_planes(
    section, q_heads=4, k_heads=2, positions=6, head_dim=32, batch=2, angle_batch=2, angle_dtype=None
):
    def make(device, dtype):
        q, k, _, _ = model_layout(q_heads, k_heads, positions, head_dim, batch=batch)(device, dtype).args
        wide = angle_dtype if dtype != torch.float64 else None
        cos_sin = angles(device, wide or dtype, 3, angle_batch, positions, 2 * sum(section))
        return Inputs((q, k, *cos_sin), {"mrope_section": section})

    return make


def mrope_call(device, cos_shape, section):
    q = torch.ones(1, 2, 4, 8, device=device)
    angle = torch.ones(*cos_shape, device=device)
    return Inputs((q, q, angle, angle), {"mrope_section": section})


class TestMrope(OperatorContract):
    function = staticmethod(mrope)
    reference = staticmethod(mrope_reference)
    differentiable = (0, 1)
    cases = [
        Case("aligned sections", three_planes([8, 8, 8], head_dim=48), terms=2),
        Case(
            "Qwen2-VL sections", three_planes([16, 24, 24], head_dim=128, positions=3), terms=2, small=False
        ),
        Case("unaligned sections", three_planes([3, 5, 8]), terms=2),
        Case("empty section", three_planes([0, 16, 0]), terms=2),
        Case("partial rotary", three_planes([2, 3, 3]), terms=2),
        Case("shared by the batch", three_planes([4, 6, 6], angle_batch=1), terms=2),
        Case("float32 angles", three_planes([4, 6, 6], angle_dtype=torch.float32), terms=2),
        Case("odd address", at_odd_address(three_planes([8, 8, 8], head_dim=48)), terms=2),
        Case("no positions", three_planes([4, 6, 6], positions=0), terms=2),
    ]
    bad_calls = [
        BadCall(
            "two-dimensional angles",
            lambda d: mrope_call(d, (4, 8), [1, 1, 2]),
            ValueError,
            r"liger::mrope: cos must have shape \[3, 1 or 1, 4, rotary_dim\] \(batch and positions of q\), "
            r"got \[4, 8\]",
        ),
        BadCall(
            "sections that leave pairs out",
            lambda d: mrope_call(d, (3, 1, 4, 8), [1, 1, 1]),
            ValueError,
            r"liger::mrope: mrope_section must be three sizes whose sum is half the last dimension of cos, "
            r"4, got \[1, 1, 1\]",
        ),
        BadCall(
            "two sections",
            lambda d: mrope_call(d, (3, 1, 4, 8), [2, 2]),
            ValueError,
            r"mrope_section must be three sizes",
        ),
        BadCall(
            "negative section",
            lambda d: mrope_call(d, (3, 1, 4, 8), [-1, 4, 1]),
            ValueError,
            r"mrope_section must be three sizes",
        ),
    ]

    def make_large(self):
        return large_case(lambda angle: angle.expand(3, *angle.shape), {"mrope_section": [16, 24, 24]})


def test_mrope_with_equal_planes_is_rope(device):
    q, k, cos, sin = model_layout()(device, torch.float32).args
    planes = (t.expand(3, *t.shape) for t in (cos, sin))
    for result, expected in zip(mrope(q, k, *planes, [4, 5, 7]), rope(q, k, cos, sin), strict=True):
        torch.testing.assert_close(result, expected)


def test_memory_order_is_kept(device):
    inputs = model_layout()(device, torch.float32)
    for before, after in zip(inputs.args[:2], rope(*inputs.args), strict=True):
        assert before.stride() == after.stride()


def test_expanded_heads(device):
    inputs = expanded_heads(device, torch.float32)
    for result, expected in zip(rope(*inputs.args), reference(*inputs.args), strict=True):
        torch.testing.assert_close(result, expected)


def test_one_output_used(device):
    """The gradient of the output that nobody used counts as zero."""
    inputs = model_layout()(device, torch.float32)
    q, k, cos, sin = inputs.args
    q.requires_grad_(), k.requires_grad_()
    out, _ = rope(q, k, cos, sin)
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert dq.abs().sum() > 0 and dk.abs().sum() == 0


def test_matches_transformers(device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, cos, sin = model_layout(head_dim=64)(device, torch.float32).args
    for result, expected in zip(rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(result, expected)


def test_interleaved_matches_transformers(device):
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

    q, k, cos, sin = interleaved(model_layout(head_dim=64))(device, torch.float32).args
    for result, expected in zip(
        rope(q, k, cos, sin, interleaved=True), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(result, expected)


def test_wide_angles_are_refused_for_float64():
    q = torch.ones(1, 1, 2, 4, dtype=torch.float64)
    angle = torch.ones(1, 2, 4)
    with pytest.raises(TypeError, match=r"liger::rope: cos must have dtype float64"):
        rope(q, q, angle, angle)
