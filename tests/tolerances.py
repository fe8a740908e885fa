"""How far a result may be from its float64 reference, as a function of dtype and reduction length.

With u the unit roundoff of the dtype (half its eps) and e the eps of the dtype that sums run in:

- each of the `roundings` to the dtype on the way to an element moves it by at most u times its size. Where an
  element is a sum, its terms were rounded, and the element itself may be smaller than they are; the root mean
  square of the result stands for their size. Hence `roundings * u * (|reference| + rms(reference))`, and half
  the distance of subnormal numbers.
- a sum of n terms in any order errs by at most n e times the largest partial sum, and by about sqrt(n) e for
  rounding errors of random sign. Hence `4 * e * sqrt(n) * max(|reference|)`; the 4 covers the few operations
  around the sum.

Where the terms of all sums may cancel, their size has to be given: it then replaces the rms, and the max is
at least as large.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def allowed_error(
    reference: Tensor, dtype: torch.dtype, terms: int, roundings: int = 2, term_size: float | None = None
) -> Tensor:
    """Elementwise bound on |result - reference| for a float64 reference."""
    u = torch.finfo(dtype).eps / 2
    # Below the smallest normal number the distance between numbers stays what it is there.
    subnormal = torch.finfo(dtype).smallest_normal * u
    e = torch.finfo(accumulate_dtype(dtype)).eps
    size = reference.abs()
    if reference.numel() == 0:
        return size
    largest = size.max().item()
    if term_size is None:
        term_size = reference.pow(2).mean().sqrt().item()
    else:
        largest = max(largest, term_size)
    return roundings * (u * (size + term_size) + subnormal) + 4 * e * math.sqrt(max(terms, 1)) * largest


def assert_within(
    result: Tensor,
    reference: Tensor,
    *,
    dtype: torch.dtype,
    terms: int,
    roundings: int = 2,
    term_size: float | None = None,
    name: str = "result",
) -> None:
    """Fails with the largest errors and the share of the budget they use."""
    assert result.shape == reference.shape, f"{name}: shape {result.shape}, reference {reference.shape}"
    reference = reference.detach().to("cpu", torch.float64)
    error = (result.detach().to("cpu", torch.float64) - reference).abs()
    if error.numel() == 0:
        return
    allowed = allowed_error(reference, dtype, terms, roundings, term_size)
    finite = bool(torch.isfinite(error).all())
    # A reference of exactly 0 everywhere leaves no budget: then the result must be 0.
    share = torch.where(error == 0, torch.zeros_like(error), error / allowed).max().item()
    relative = (error / reference.abs().clamp_min(torch.finfo(torch.float64).tiny)).max().item()
    assert finite and share <= 1, (
        f"{name} ({dtype}): max absolute error {error.max().item():.3e}, max relative error {relative:.3e}, "
        f"{100 * share:.0f} % of the error budget"
    )
