"""What each operator is benchmarked on: inputs, reference, and the least work any implementation must do.

A case says nothing about implementations: those are in `providers.py`. The letters in the floors are
M tokens, H hidden, I intermediate, V vocabulary, e bytes per element.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .shapes import Shape

Tensors = list[torch.Tensor]

NORM_EPS = 1e-5
ROPE_THETA = 500_000.0


@dataclass(frozen=True)
class Floor:
    """Memory traffic in bytes and matrix products in flops that no implementation can avoid.

    The time of the traffic is that of a copy which moves as many bytes; that of the products is measured by
    themselves (`measure.head_products`). On a CPU, results that stay in the last-level cache are not yet
    written to memory when the clock stops, so small cases can beat their floor.
    """

    moved: int = 0
    flops: int = 0

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.moved + other.moved, self.flops + other.flops)


@dataclass(frozen=True)
class Case:
    """One operator at one size. `arguments` are the positional arguments that every provider gets."""

    # The function of the providers and of the reference; several cases can be about one function.
    function: str
    sizes: dict[str, int]
    arguments: Tensors
    differentiable: tuple[bool, ...]
    output_gradients: Tensors
    forward_floor: Floor
    # None where the backward of a loss has no floor of its own: a provider may do all of it in forward.
    backward_floor: Floor | None
    full_floor: Floor

    def floor(self, mode: str) -> Floor | None:
        return {"fwd": self.forward_floor, "bwd": self.backward_floor, "full": self.full_floor}[mode]


@dataclass(frozen=True)
class Problem:
    """What the user chose; builders turn it into cases."""

    shape: Shape
    tokens: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    loss_gradient: float
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def empty(self, *size: int) -> torch.Tensor:
        return torch.empty(size, device=self.device, dtype=self.dtype)

    def normal(self, *size: int, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
        # Never zeros: matrix products on zeros run measurably faster than on real data.
        values = torch.randn(*size, generator=generator, device=self.device, dtype=self.dtype)
        return values.mul_(scale)


def rms_norm_of(p: Problem, *size: int) -> Case:
    g = p.generator()
    h, e = size[-1], p.dtype.itemsize
    m = math.prod(size[:-1])
    x = p.normal(*size, generator=g)
    weight = p.normal(h, generator=g, scale=0.1).add_(1)
    forward = Floor(moved=2 * m * h * e + h * e)
    backward = Floor(moved=3 * m * h * e + 4 * m + 2 * h * e)
    return Case(
        "rms_norm",
        {"rows": m, "width": h},
        [x, weight],
        (True, True),
        [p.normal(*size, generator=g)],
        forward,
        backward,
        forward + backward + Floor(moved=4 * m),  # training also stores the fp32 statistics
    )


def rms_norm(p: Problem) -> Case:
    return rms_norm_of(p, p.tokens, p.shape.hidden)


def qk_norm(p: Problem) -> Case:
    """The norm of each head of the queries, as Qwen3 and Gemma 3 have it: many short rows."""
    return rms_norm_of(p, p.batch, p.tokens // p.batch, p.shape.heads, p.shape.head_dim)


def add_rms_norm(p: Problem) -> Case:
    g = p.generator()
    m, h, e = p.tokens, p.shape.hidden, p.dtype.itemsize
    x, residual = (p.normal(m, h, generator=g) for _ in range(2))
    weight = p.normal(h, generator=g, scale=0.1).add_(1)
    forward = Floor(moved=4 * m * h * e + h * e)
    # One gradient, although ours writes it twice: an implementation may hand out one tensor for both.
    backward = Floor(moved=4 * m * h * e + 4 * m + 2 * h * e)
    return Case(
        "add_rms_norm",
        {"rows": m, "width": h},
        [x, residual, weight],
        (True, True, True),
        [p.normal(m, h, generator=g) for _ in range(2)],
        forward,
        backward,
        forward + backward + Floor(moved=4 * m),
    )


def layer_norm(p: Problem) -> Case:
    g = p.generator()
    m, h, e = p.tokens, p.shape.hidden, p.dtype.itemsize
    x = p.normal(m, h, generator=g)
    weight, bias = p.normal(h, generator=g, scale=0.1).add_(1), p.normal(h, generator=g, scale=0.1)
    forward = Floor(moved=2 * m * h * e + 2 * h * e)
    backward = Floor(moved=3 * m * h * e + 8 * m + 3 * h * e)
    return Case(
        "layer_norm",
        {"rows": m, "width": h},
        [x, weight, bias],
        (True, True, True),
        [p.normal(m, h, generator=g)],
        forward,
        backward,
        forward + backward + Floor(moved=8 * m),
    )


def mrope_section(head_dim: int) -> list[int]:
    """How many pairs take their angle from time, height and width: Qwen2-VL's proportions."""
    pairs = head_dim // 2
    spatial = 3 * pairs // 8
    return [pairs - 2 * spatial, spatial, spatial]


def rotary(p: Problem, function: str, planes: tuple[int, ...]) -> Case:
    """Queries and keys, and angles of each of the planes: `[*planes, positions, head_dim]`."""
    g = p.generator()
    s, e = p.shape, p.dtype.itemsize
    length = p.tokens // p.batch

    def heads(count: int) -> torch.Tensor:
        # The memory order of a model: the projection's output, seen with heads before positions.
        return p.normal(p.batch, length, count, s.head_dim, generator=g).transpose(1, 2)

    frequencies = ROPE_THETA ** (
        -torch.arange(0, s.head_dim, 2, device=p.device, dtype=torch.float32) / s.head_dim
    )
    positions = torch.arange(length, device=p.device, dtype=torch.float32)
    # Every plane has positions of its own.
    steps = 1 + torch.arange(math.prod(planes), device=p.device, dtype=torch.float32)
    angles = (steps[:, None] * positions)[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1).view(*planes, length, s.head_dim)
    cos, sin = angles.cos().to(p.dtype), angles.sin().to(p.dtype)
    # Each pair takes its angle from one of the three planes of mrope: one plane's worth is read.
    angles_read = 2 * planes[-1] * length * s.head_dim * e
    once = Floor(moved=2 * p.tokens * (s.heads + s.kv_heads) * s.head_dim * e + angles_read)
    return Case(
        function,
        {"tokens": p.tokens, "heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim},
        [heads(s.heads), heads(s.kv_heads), cos, sin],
        (True, True, False, False),
        [heads(s.heads), heads(s.kv_heads)],
        once,
        once,
        once + once,
    )


def rope(p: Problem) -> Case:
    return rotary(p, "rope", (1,))


def mrope(p: Problem) -> Case:
    return rotary(p, "mrope", (3, p.batch))


def gated_unit(function: str, p: Problem) -> Case:
    g = p.generator()
    m, i, e = p.tokens, p.shape.intermediate, p.dtype.itemsize
    widths = [2 * i] if function.endswith("_packed") else [i, i]
    arguments = [p.normal(m, width, generator=g) for width in widths]
    upstream = [p.normal(m, i, generator=g)]
    forward, backward = Floor(moved=3 * m * i * e), Floor(moved=5 * m * i * e)
    flags = (True,) * len(arguments)
    sizes = {"rows": m, "width": i}
    return Case(function, sizes, arguments, flags, upstream, forward, backward, forward + backward)


def swiglu(p: Problem) -> Case:
    return gated_unit("swiglu", p)


def swiglu_packed(p: Problem) -> Case:
    return gated_unit("swiglu_packed", p)


def geglu(p: Problem) -> Case:
    return gated_unit("geglu", p)


def geglu_packed(p: Problem) -> Case:
    return gated_unit("geglu_packed", p)


def targets(p: Problem, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(p.shape.vocab, (p.tokens,), generator=generator, device=p.device)


def loss_gradient(p: Problem) -> Tensors:
    return [torch.tensor(p.loss_gradient, device=p.device, dtype=torch.float32)]


def cross_entropy(p: Problem) -> Case:
    g = p.generator()
    m, v, e = p.tokens, p.shape.vocab, p.dtype.itemsize
    logits = p.normal(m, v, generator=g)
    return Case(
        "cross_entropy",
        {"rows": m, "classes": v},
        [logits, targets(p, g)],
        (True, False),
        loss_gradient(p),
        Floor(moved=m * v * e),
        None,
        Floor(moved=2 * m * v * e),
    )


def fused_linear_cross_entropy(p: Problem) -> Case:
    g = p.generator()
    m, h, v, e = p.tokens, p.shape.hidden, p.shape.vocab, p.dtype.itemsize
    x = p.normal(m, h, generator=g)
    weight = p.normal(v, h, generator=g, scale=h**-0.5)  # logits of unit variance
    # The logits are a product's output, so a loss over them costs at least one pass for the statistics and,
    # with gradients, a second one: the traffic of cross_entropy on top of the products.
    return Case(
        "fused_linear_cross_entropy",
        {"rows": m, "hidden": h, "classes": v},
        [x, weight, targets(p, g)],
        (True, True, False),
        loss_gradient(p),
        Floor(moved=m * v * e, flops=2 * m * h * v),
        None,
        Floor(moved=2 * m * v * e, flops=6 * m * h * v),
    )


OPS: dict[str, Callable[[Problem], Case]] = {
    builder.__name__: builder
    for builder in (
        rms_norm,
        qk_norm,
        add_rms_norm,
        layer_norm,
        rope,
        mrope,
        swiglu,
        swiglu_packed,
        geglu,
        geglu_packed,
        cross_entropy,
        fused_linear_cross_entropy,
    )
}


HEAD = "fused_linear_cross_entropy"
LOSSES = ("cross_entropy", HEAD)
# Operators of rows whose width is the hidden or the intermediate size.
ROWS = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "swiglu",
    "swiglu_packed",
    "geglu",
    "geglu_packed",
)


def options(case: Case) -> dict:
    """What the reference takes beside the arguments."""
    if case.function.endswith("_norm"):
        return {"eps": NORM_EPS}
    if case.function == "mrope":
        return {"mrope_section": mrope_section(case.sizes["head_dim"])}
    return {}


def reference_function(name: str) -> Callable:
    # In a wheel the tests' references are part of this package.
    inside = f"{__package__}.reference"
    package = inside if importlib.util.find_spec(inside) else "tests.reference"
    module = {"mrope": "rope"}.get(name, name.removesuffix("_packed"))
    return getattr(importlib.import_module(f"{package}.{module}"), name)


def reference(case: Case) -> tuple[Tensors, Tensors]:
    """Outputs and gradients of the tests' plain PyTorch, in fp64 (fp32 for 16-bit cases, which it dwarfs)."""
    function = reference_function(case.function)
    wide = torch.float64 if case.arguments[0].dtype.itemsize >= 4 else torch.float32

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(wide) if tensor.is_floating_point() else tensor

    arguments = [widen(a).requires_grad_(d) for a, d in zip(case.arguments, case.differentiable, strict=True)]
    outputs = as_list(function(*arguments, **options(case)))
    wanted = [a for a in arguments if a.requires_grad]
    upstream = [
        widen(gradient).to(o.dtype) for gradient, o in zip(case.output_gradients, outputs, strict=True)
    ]
    gradients = torch.autograd.grad(outputs, wanted, upstream)
    return [o.detach() for o in outputs], list(gradients)


def as_list(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> Tensors:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
