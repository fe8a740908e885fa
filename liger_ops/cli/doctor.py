"""``python -m liger_ops doctor``: does what is installed work here?

Each operator runs forward and backward on small inputs, on every device it has kernels for, and is compared
with a few lines of plain PyTorch in fp64. The lines are written out here, so that an installed package checks
itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

import liger_ops.functional as LF
from liger_ops import _library
from liger_ops.cli.info import KEYS, kernels
from liger_ops.cli.table import table

SUMMARY = "check that the library loads, computes the right numbers and compiles; fails with a reason"

# Largest error, relative to the largest reference value. A 16-bit result may be rounded at two points, and a
# sum over a few hundred of them enters some gradients: eight times the unit roundoff (2^-24, 2^-8) leaves
# room for both.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8 * 2**-8}

ROWS, WIDTH, VOCAB = 24, 96, 257

Shape = tuple[int, ...]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Result:
    """Outcome of one check. ``detail`` is the reason when it failed."""

    check: str
    device: str
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Case:
    """An operator, its reference, and the shapes of its arguments with (``shapes``) and without gradient."""

    operator: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: tuple[Shape, ...]
    constants: tuple[Shape, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.add_argument(
        "--accuracy",
        action="store_true",
        help="compare the errors against float64 with those of transformers' eager code (needs transformers)",
    )


def run(options: argparse.Namespace) -> int:
    """Run every check, print the results, and return 0 when all passed."""
    if options.accuracy:
        from liger_ops.cli import accuracy

        return accuracy.run(options.json, _devices())
    results = list(checks())
    failed = [result for result in results if not result.ok]
    if options.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(result) for result in results]}, indent=2))
    else:
        rows = [("check", "device", "result", "detail")]
        rows += [(r.check, r.device, "ok" if r.ok else "FAILED", r.detail) for r in results]
        print(table(rows))
        print()
        print(f"{len(results) - len(failed)} of {len(results)} checks passed")
        for result in failed:
            print(f"{result.check} on {result.device}: {result.detail}")
    return 1 if failed else 0


def checks() -> Iterator[Result]:
    """Every check that applies to this machine, in the order in which a failure is most telling."""
    yield _timed("library", "-", _check_library)
    yield _timed("kernels", "-", _check_kernels)
    for device in _devices():
        for case in CASES:
            yield _timed(case.operator, device, lambda case=case, device=device: _check_numbers(case, device))
        yield _timed("torch.compile(fullgraph=True)", device, lambda device=device: _check_compile(device))


def _timed(check: str, device: str, function: Callable[[], str]) -> Result:
    start = time.perf_counter()
    try:
        ok, detail = True, function()
    except Exception as error:  # a doctor reports whatever goes wrong
        ok, detail = (
            False,
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
        )
    return Result(check, device, ok, detail, round(time.perf_counter() - start, 3))


def _devices() -> list[str]:
    cuda = torch.cuda.is_available() and kernels("rms_norm")["CUDA"]
    return ["cpu", "cuda"] if cuda else ["cpu"]


def _check_library() -> str:
    build = _library.build_info()
    detail = f"built with torch {build['torch']}, running with {torch.__version__}"
    if torch.cuda.is_available() and not build["cuda"]:
        raise RuntimeError(
            "this machine has a CUDA device, and liger_ops was built without CUDA; build it again"
        )
    return detail


def _check_kernels() -> str:
    columns = [column for column in KEYS if column != "CUDA" or _library.build_info()["cuda"]]
    missing = [
        f"liger::{name} ({column})"
        for name in _library.operators()
        for column in columns
        if not kernels(name)[column]
    ]
    if missing:
        raise RuntimeError(f"no kernel for {', '.join(missing)}")
    return f"{len(_library.operators())} operators with {', '.join(columns)}"


def _check_numbers(case: Case, device: str) -> str:
    """Results and gradients of one operator, in each dtype, against the reference in fp64."""
    errors = []
    for dtype, tolerance in TOLERANCE.items():
        inputs = [x.to(dtype) for x in _random(case.shapes, device)]
        constants = [x.to(dtype) for x in _random(case.constants, device)]
        actual = _results_and_gradients(case.run, inputs, constants)
        exact = [x.double() for x in inputs], [x.double() for x in constants]
        expected = _results_and_gradients(case.reference, *exact)
        worst = max(map(_relative_error, actual, expected))
        # Written so that a NaN fails as well.
        if not worst <= tolerance:
            raise RuntimeError(f"relative error {worst:.2g} in {dtype}, above {tolerance:.2g}")
        errors.append(f"{worst:.1e} in {str(dtype).removeprefix('torch.')}")
    return f"relative error {', '.join(errors)}"


def _random(shapes: tuple[Shape, ...], device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _results_and_gradients(
    function: Callable[..., Any], inputs: list[torch.Tensor], constants: list[torch.Tensor]
) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = function(*inputs, *constants)
    results = results if isinstance(results, tuple) else (results,)
    # A different weight for each element, so that gradients that are merely constant do not pass.
    weighted = sum(
        (r.double() * torch.linspace(0.5, 1.5, r.numel()).to(r.device).view_as(r)).sum() for r in results
    )
    return [*results, *torch.autograd.grad(weighted, inputs)]


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def _check_compile(device: str) -> str:
    """All operators in one graph, without a break, with the results of eager execution."""
    inputs = _random(((ROWS, WIDTH), (WIDTH,), (VOCAB, WIDTH), Q, K), device)
    constants = _random((ANGLES, ANGLES), device)

    def function(x: torch.Tensor, norm: torch.Tensor, head: torch.Tensor, *rotary: torch.Tensor) -> Tensors:
        hidden, total = LF.add_rms_norm(LF.layer_norm(x, norm), x, norm)
        hidden = LF.swiglu(LF.rms_norm(hidden, norm), total)
        hidden = LF.geglu(hidden, x) + LF.swiglu_packed(torch.cat([hidden, x], -1))
        hidden = hidden + LF.geglu_packed(torch.cat([x, hidden], -1), "none")
        loss = LF.fused_linear_cross_entropy(hidden, head, _targets(x))
        return loss + LF.cross_entropy(F.linear(hidden, head), _targets(x)), *LF.rope(*rotary)

    # aot_eager needs no compiler on the machine, and breaks on the same things as the default backend.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = _results_and_gradients(function, inputs, constants)
    actual = _results_and_gradients(compiled, inputs, constants)
    worst = max(map(_relative_error, actual, expected))
    if not worst <= TOLERANCE[torch.float32]:
        raise RuntimeError(f"compiled and eager results differ by {worst:.2g}")
    return "one graph, results equal to eager"


def _targets(x: torch.Tensor) -> torch.Tensor:
    """One target for each row, every fifth ignored."""
    rows = torch.arange(x.shape[0], device=x.device)
    return torch.where(rows % 5 == 4, -100, rows * 7 % VOCAB)


def _rms_norm_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _add_rms_norm_reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Tensors:
    return _rms_norm_reference(x + residual, weight), x + residual


def _rope_reference(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

    return rotate(q), rotate(k)


def _halves(x: torch.Tensor) -> Tensors:
    return x.chunk(2, dim=-1)


Q, K, ANGLES = (2, 4, 6, 16), (2, 2, 6, 16), (1, 6, 16)

CASES = (
    Case("rms_norm", LF.rms_norm, _rms_norm_reference, ((ROWS, WIDTH), (WIDTH,))),
    Case("add_rms_norm", LF.add_rms_norm, _add_rms_norm_reference, ((ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,))),
    Case(
        "layer_norm",
        LF.layer_norm,
        lambda x, weight, bias: F.layer_norm(x, (WIDTH,), weight, bias),
        ((ROWS, WIDTH), (WIDTH,), (WIDTH,)),
    ),
    Case("rope", LF.rope, _rope_reference, (Q, K), (ANGLES, ANGLES)),
    Case("swiglu", LF.swiglu, lambda gate, up: F.silu(gate) * up, ((ROWS, WIDTH), (ROWS, WIDTH))),
    Case(
        "swiglu_packed",
        LF.swiglu_packed,
        lambda x: F.silu(_halves(x)[0]) * _halves(x)[1],
        ((ROWS, 2 * WIDTH),),
    ),
    *(
        Case(
            f"geglu ({approximate})",
            lambda gate, up, a=approximate: LF.geglu(gate, up, a),
            lambda gate, up, a=approximate: F.gelu(gate, approximate=a) * up,
            ((ROWS, WIDTH), (ROWS, WIDTH)),
        )
        for approximate in ("tanh", "none")
    ),
    Case(
        "geglu_packed",
        LF.geglu_packed,
        lambda x: F.gelu(_halves(x)[0], approximate="tanh") * _halves(x)[1],
        ((ROWS, 2 * WIDTH),),
    ),
    Case(
        "cross_entropy",
        lambda logits: LF.cross_entropy(logits, _targets(logits)),
        lambda logits: F.cross_entropy(logits, _targets(logits)),
        ((ROWS, VOCAB),),
    ),
    Case(
        "fused_linear_cross_entropy",
        lambda x, weight, bias: LF.fused_linear_cross_entropy(x, weight, _targets(x), bias),
        lambda x, weight, bias: F.cross_entropy(F.linear(x, weight, bias), _targets(x)),
        ((ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,)),
    ),
)
