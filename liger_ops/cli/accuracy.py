"""``python -m liger_ops doctor --accuracy``: is fused arithmetic as accurate as what it replaces?

Every operator and transformers' own code compute the same thing from the same 16- and 32-bit inputs, forward
and backward, and both are compared with float64. The inputs include the ones that fused kernels are known to
lose on: large and tiny magnitudes, long rows, a large mean, a softmax that is sure of itself, logits of 1e4,
float16 near its limits, sums of gradients over many tokens.

The error of a tensor is the root mean square of its deviations over the root mean square of the exact values.
A line passes when our error is at most ``NOISE`` times transformers', or no larger than what remains of an
exact result after one rounding; in float32, where rounded factors (1/N, the rstd of a row) shift all elements
alike, no larger than two roundings at their worst.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

import liger_ops.functional as LF
from liger_ops.cli.info import collect
from liger_ops.cli.table import table

Tensors = tuple[torch.Tensor, ...]

# Two computations that round at the same places in a different order differ by a few percent.
NOISE = 1.05
# The weight's gradient of fused linear cross entropy is summed over the chunks in the weight's dtype unless
# accum_dtype says otherwise.
CHUNKED_NOISE = 2.0

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Line:
    """The errors of one result. ``passed`` says that ours is not the larger one beyond rounding noise."""

    operator: str
    inputs: str
    device: str
    dtype: str
    result: str
    ours: float
    transformers: float
    passed: bool


@dataclass(frozen=True)
class Case:
    """One operator on one kind of inputs.

    Attributes:
        operator: name in ``torch.ops.liger``.
        inputs: what is special about them.
        make: tensors in float32 on the CPU, from a generator; ``differentiable`` of them get gradients.
        ours, transformers, exact: the same function; ``exact`` gets float64.
        results: names of the outputs and then of the gradients.
        dtypes: what the inputs are rounded to.
        noise: factor allowed for some result, by its name.
    """

    operator: str
    inputs: str
    make: Callable[[torch.Generator], Tensors]
    differentiable: int
    ours: Callable[..., Any]
    transformers: Callable[..., Any]
    exact: Callable[..., Any]
    results: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    noise: tuple[tuple[str, float], ...] = ()


def run(as_json: bool, devices: list[str]) -> int:
    """Measure on every device, print a table, and return 0 when every line passed."""
    found = [line for device in devices for line in lines(device)]
    failed = [line for line in found if not line.passed]
    if as_json:
        environment = collect()
        document = {
            "command": "python -m liger_ops doctor --accuracy --json",
            "date": datetime.date.today().isoformat(),
            "versions": environment["versions"],
            "devices": environment["devices"],
            "ok": not failed,
        }
        # A line of text for each line.
        measured = ",\n".join("  " + json.dumps(asdict(line)) for line in found)
        print(json.dumps(document, indent=1)[:-2] + f',\n "lines": [\n{measured}\n ]\n}}')
        return 1 if failed else 0
    rows = [("operator", "inputs", "device", "dtype", "result", "ours", "transformers", "ratio", "")]
    for line in found:
        ratio = f"{line.ours / line.transformers:.2f}" if line.transformers else "-"
        rows.append(
            (
                *(line.operator, line.inputs, line.device, line.dtype, line.result),
                *(f"{line.ours:.2e}", f"{line.transformers:.2e}", ratio, "" if line.passed else "LARGER"),
            )
        )
    print(table(rows))
    print()
    print(f"{len(found) - len(failed)} of {len(found)} errors are no larger than transformers'")
    return 1 if failed else 0


def lines(device: str) -> Iterator[Line]:
    """Measure every case on ``device``. ImportError without transformers, which is what is compared with."""
    for case in cases():
        for dtype in case.dtypes:
            yield from _measure(case, dtype, device)


def _measure(case: Case, dtype: torch.dtype, device: str) -> Iterator[Line]:
    generator = torch.Generator().manual_seed(0)
    made = [x.to(dtype) if x.is_floating_point() else x for x in case.make(generator)]
    upstream: list[torch.Tensor] = []

    def evaluate(function: Callable[..., Any], arguments: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in arguments[: case.differentiable]]
        outputs = function(*leaves, *arguments[case.differentiable :])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not upstream:
            upstream.extend(_upstream(o, generator).to(dtype) for o in outputs)
        sent = [g.to(o) for g, o in zip(upstream, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, sent)]

    ours = evaluate(case.ours, [x.to(device) for x in made])
    theirs = evaluate(case.transformers, [x.to(device) for x in made])
    exact = evaluate(case.exact, [x.double() if x.is_floating_point() else x for x in made])
    noise = dict(case.noise)
    for name, mine, other, truth in zip(case.results, ours, theirs, exact, strict=True):
        errors = _error(mine, truth), _error(other, truth)
        limit = max(noise.get(name, NOISE) * errors[1], _unavoidable(truth, mine.dtype))
        yield Line(case.operator, case.inputs, device, _name(dtype), name, *errors, errors[0] <= limit)


def _upstream(output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if output.dim() == 0:
        return torch.ones(())
    return torch.randn(output.shape, generator=generator)


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    difference = _rms(result.detach().cpu().double() - exact.detach())
    size = _rms(exact.detach())
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size else difference


def _unavoidable(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """The error of the exact result once it is rounded to dtype; see the module's docstring for float32."""
    exact = exact.detach()
    if dtype == torch.float32:
        return torch.finfo(dtype).eps
    if exact.dim() == 0:
        return torch.finfo(dtype).eps / 2
    return NOISE * _error(exact.to(dtype), exact)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------- the cases


def cases() -> list[Case]:
    """Every operator on every kind of inputs."""
    return [*_norms(), *_rotary(), *_glus(), *_losses(), *_fused_losses()]


Maker = Callable[[torch.Generator], torch.Tensor]


def _normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Maker:
    return lambda generator: torch.randn(shape, generator=generator) * scale + mean


def _tensors(*makers: Maker) -> Callable[[torch.Generator], Tensors]:
    return lambda generator: tuple(make(generator) for make in makers)


def _norms() -> Iterator[Case]:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def module(cls: type) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def normalize(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            with torch.device("meta"):
                norm = cls(weight.shape[0], eps=1e-6)
            return torch.func.functional_call(norm, {"weight": weight}, (x,))

        return normalize

    llama, gemma = module(LlamaRMSNorm), module(GemmaRMSNorm)

    def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    for inputs, rows, width, scale in (
        ("typical", 64, 4096, 1.0),
        ("tiny", 64, 4096, 1e-4),
        ("large", 64, 4096, 5e3),
        ("long rows", 4, 65536, 1.0),
        ("heads of 128", 4096, 128, 1.0),
    ):
        x, weight = _normal(rows, width, scale=scale), _normal(width, scale=0.1, mean=1.0)
        yield Case(
            "rms_norm, llama",
            inputs,
            _tensors(x, weight),
            2,
            LF.rms_norm,
            llama,
            exact,
            ("y", "dx", "dweight"),
        )
        yield Case(
            "rms_norm, gemma",
            inputs,
            _tensors(x, _normal(width, scale=0.1)),
            2,
            lambda x, w: LF.rms_norm(x, w, offset=1.0, casting_mode="gemma"),
            gemma,
            lambda x, w: exact(x, 1 + w),
            ("y", "dx", "dweight"),
        )
        yield Case(
            "add_rms_norm",
            inputs,
            _tensors(x, x, weight),
            3,
            LF.add_rms_norm,
            lambda x, residual, w: (llama(x + residual, w), x + residual),
            lambda x, residual, w: (exact(x + residual, w), x + residual),
            ("y", "sum", "dx", "dresidual", "dweight"),
        )
    for inputs, rows, width, scale, mean in (
        ("typical", 64, 4096, 1.0, 0.0),
        ("tiny", 64, 4096, 1e-3, 0.0),
        ("large", 64, 4096, 5e3, 0.0),
        ("large mean", 64, 4096, 1.0, 1e3),
        ("long rows", 4, 65536, 1.0, 0.0),
    ):
        yield Case(
            "layer_norm",
            inputs,
            _tensors(
                _normal(rows, width, scale=scale, mean=mean),
                _normal(width, scale=0.1, mean=1.0),
                _normal(width, scale=0.1),
            ),
            3,
            LF.layer_norm,
            _layer_norm,
            _layer_norm,
            ("y", "dx", "dweight", "dbias"),
        )


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _rotary() -> Iterator[Case]:
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    section = [16, 24, 24]

    def merged(angle: torch.Tensor) -> torch.Tensor:
        planes = [plane for plane, pairs in enumerate(section) for _ in range(pairs)] * 2
        return torch.stack([angle[plane, ..., j] for j, plane in enumerate(planes)], dim=-1)

    def multimodal(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
        return apply_rotary_pos_emb(q, k, merged(cos), merged(sin))

    def exact_interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
        def rotate(x: torch.Tensor) -> torch.Tensor:
            quarter_turn = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
            return x * cos.unsqueeze(1) + quarter_turn * sin.unsqueeze(1)

        return rotate(q), rotate(k)

    def angles(function: Callable[[torch.Tensor], torch.Tensor], planes: int, repeat: Any) -> Maker:
        frequencies = 500_000.0 ** (-torch.arange(0, 128, 2) / 128)
        positions = torch.arange(planes * 64).view(planes, 64, 1) * 37.0
        return lambda generator: function(repeat(positions * frequencies))

    def halves(angle: torch.Tensor) -> torch.Tensor:
        return torch.cat((angle, angle), dim=-1)

    def neighbours(angle: torch.Tensor) -> torch.Tensor:
        return angle.repeat_interleave(2, dim=-1)

    heads = _normal(2, 8, 64, 128), _normal(2, 2, 64, 128)
    results = ("q", "k", "dq", "dk")
    cos_sin = angles(torch.cos, 1, halves), angles(torch.sin, 1, halves)
    yield Case(
        "rope",
        "typical",
        _tensors(*heads, *cos_sin),
        2,
        LF.rope,
        apply_rotary_pos_emb,
        apply_rotary_pos_emb,
        results,
    )
    cos_sin = angles(torch.cos, 1, neighbours), angles(torch.sin, 1, neighbours)
    yield Case(
        "rope, interleaved",
        "typical",
        _tensors(*heads, *cos_sin),
        2,
        lambda *tensors: LF.rope(*tensors, interleaved=True),
        interleaved,
        exact_interleaved,
        results,
    )

    def planes(function: Callable[[torch.Tensor], torch.Tensor]) -> Maker:
        make = angles(function, 3, halves)
        return lambda generator: make(generator).unsqueeze(1)

    yield Case(
        "mrope",
        "typical",
        _tensors(*heads, planes(torch.cos), planes(torch.sin)),
        2,
        lambda *tensors: LF.mrope(*tensors, section),
        multimodal,
        multimodal,
        results,
    )


def _glus() -> Iterator[Case]:
    from transformers.activations import ACT2FN

    def product(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        activation = ACT2FN[name]
        return lambda gate, up: activation(gate) * up

    def packed(function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda gate_up: function(*gate_up.chunk(2, dim=-1))

    for operator, ours, ours_packed, name in (
        ("swiglu", LF.swiglu, LF.swiglu_packed, "silu"),
        ("geglu, tanh", LF.geglu, LF.geglu_packed, "gelu_pytorch_tanh"),
        (
            "geglu, exact",
            lambda gate, up: LF.geglu(gate, up, approximate="none"),
            lambda gate_up: LF.geglu_packed(gate_up, approximate="none"),
            "gelu",
        ),
    ):
        for inputs, scale in (("typical", 1.0), ("tiny", 1e-3), ("large", 40.0)):
            both = _normal(64, 4096, scale=scale)
            eager = product(name)
            yield Case(operator, inputs, _tensors(both, both), 2, ours, eager, eager, ("out", "dgate", "dup"))
        eager = packed(product(name))
        yield Case(
            operator.replace(",", "_packed,") if "," in operator else f"{operator}_packed",
            "typical",
            _tensors(_normal(64, 8192)),
            1,
            ours_packed,
            eager,
            eager,
            ("out", "dgate_up"),
        )


def _targets(rows: int, classes: int) -> Maker:
    """Class indices, every eighth ignored."""

    def make(generator: torch.Generator) -> torch.Tensor:
        target = torch.randint(classes, (rows,), generator=generator)
        return torch.where(torch.arange(rows) % 8 == 7, -100, target)

    return make


def _confident(rows: int, classes: int, margin: float) -> Callable[[torch.Generator], Tensors]:
    """Logits in which the target stands out by ``margin``."""

    def make(generator: torch.Generator) -> Tensors:
        target = _targets(rows, classes)(generator)
        logits = torch.randn(rows, classes, generator=generator)
        logits[torch.arange(rows), target.clamp_min(0)] += margin
        return logits, target

    return make


def _losses() -> Iterator[Case]:
    def eager(logits: torch.Tensor, target: torch.Tensor, cap: float | None = None) -> torch.Tensor:
        """What transformers' causal-LM heads do: cap in the logits' dtype, widen, then F.cross_entropy."""
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, target)

    results = ("loss", "dlogits")
    for inputs, make in (
        ("typical", _tensors(_normal(64, 32000), _targets(64, 32000))),
        ("tiny", _tensors(_normal(64, 32000, scale=1e-4), _targets(64, 32000))),
        ("logits of 1e4", _tensors(_normal(64, 4096, scale=1e4), _targets(64, 4096))),
        ("confident", _confident(64, 32000, 20.0)),
        ("very confident", _confident(64, 32000, 40.0)),
        ("long rows", _tensors(_normal(8, 262144), _targets(8, 262144))),
    ):
        yield Case("cross_entropy", inputs, make, 1, LF.cross_entropy, eager, eager, results)
    yield Case(
        "cross_entropy, softcap",
        "logits of 50",
        _tensors(_normal(64, 32000, scale=50.0), _targets(64, 32000)),
        1,
        lambda logits, target: LF.cross_entropy(logits, target, softcap=30.0),
        lambda logits, target: eager(logits, target, 30.0),
        lambda logits, target: eager(logits, target, 30.0),
        results,
    )


def _fused_losses() -> Iterator[Case]:
    tokens, hidden, classes = 1024, 128, 4096

    def eager(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, weight)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)

    def ours(**options: Any) -> Callable[..., torch.Tensor]:
        # Four chunks, as LLaMA 3 has them at 8192 tokens.
        options["workspace_bytes"] = tokens * classes * 4 // 4
        return lambda x, weight, target: LF.fused_linear_cross_entropy(x, weight, target, **options)

    typical = _tensors(
        _normal(tokens, hidden), _normal(classes, hidden, scale=hidden**-0.5), _targets(tokens, classes)
    )

    def sure(generator: torch.Generator) -> Tensors:
        """Every input points to its target's row of the weight."""
        target = _targets(tokens, classes)(generator)
        weight = torch.randn(classes, hidden, generator=generator)
        x = weight[target.clamp_min(0)] + 0.1 * torch.randn(tokens, hidden, generator=generator)
        return x, weight, target

    results = ("loss", "dinput", "dweight")
    for inputs, make in (("typical", typical), ("confident", sure)):
        yield Case(
            "fused_linear_cross_entropy",
            inputs,
            make,
            2,
            ours(),
            eager,
            eager,
            results,
            noise=(("dweight", CHUNKED_NOISE),),
        )
        yield Case(
            "fused_linear_cross_entropy, accum_dtype=float32",
            inputs,
            make,
            2,
            ours(accum_dtype=torch.float32),
            eager,
            eager,
            results,
            dtypes=(torch.bfloat16, torch.float16),
        )
