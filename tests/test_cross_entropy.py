"""What is special about cross entropy; the contract is in test_loss_contract.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from liger_ops.functional import cross_entropy
from tests.reference.cross_entropy import cross_entropy as reference

# Noise between two ways to round the same numbers.
NO_WORSE = 1.05


def gradient(function, x, *args, **kwargs):
    x = x.detach().clone().requires_grad_()
    loss = function(x, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_is_that_of_torch(reduction):
    logits = torch.randn(12, 19, dtype=torch.float64)
    target = torch.randint(19, (12,)).index_fill(0, torch.tensor([2, 7]), -100)
    for weight, smoothing in itertools.product([None, torch.rand(19).double() + 0.1], [0.0, 0.3]):
        options = dict(weight=weight, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(
            gradient(reference, logits, target, **options),
            gradient(F.cross_entropy, logits, target, **options),
        )


@pytest.mark.parametrize(
    "scale, offset",
    [(1.0, 0.0), (10.0, 0.0), (1.0, 1e4), (1.0, -1e4), (1e4, 0.0), (3.0, 1e3)],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_less_accurate_than_torch(device, scale, offset, smoothing):
    """Also for logits so large that a float32 log-sum-exp keeps no digits behind the point."""
    logits = (scale * torch.randn(64, 4099) + offset).to(device)
    target = torch.randint(4099, (64,), device=device)
    options = dict(label_smoothing=smoothing, reduction="none")
    exact = gradient(F.cross_entropy, logits.double(), target, **options)
    ours = gradient(cross_entropy, logits, target, **options)
    torchs = gradient(F.cross_entropy, logits, target, **options)
    for name, a, b, e in zip(("loss", "gradient"), ours, torchs, exact, strict=True):
        ours_error, torch_error = ((t.double() - e).norm().item() for t in (a, b))
        # Results that torch happens to get exactly right leave room for one rounding.
        floor = torch.finfo(torch.float32).eps * e.norm().item() / 2
        assert ours_error <= NO_WORSE * max(torch_error, floor), f"{name}: {ours_error}, torch {torch_error}"


def test_certain_prediction(device):
    """Where p goes to 1, p - 1 keeps its digits."""
    logits = torch.zeros(6, 100, device=device)
    logits[:, 3] = torch.tensor([5.0, 10.0, 14.0, 15.0, 16.0, 40.0])
    target = torch.full((6,), 3, device=device)
    _, dlogits = gradient(cross_entropy, logits, target, reduction="sum")
    _, exact = gradient(F.cross_entropy, logits.double(), target, reduction="sum")
    torch.testing.assert_close(dlogits[:5, 3].double(), exact[:5, 3], rtol=2e-2, atol=0)
    torch.testing.assert_close(dlogits[:3, 3].double(), exact[:3, 3], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_classes(device, dtype):
    """Classes at -inf have probability 0, wherever in the row they are."""
    for columns in (slice(0, 5000), slice(100, 9000), slice(8000, None)):
        logits = torch.randn(4, 9001).to(device, dtype)
        logits[:, columns] = -torch.inf
        allowed = torch.isfinite(logits[0]).nonzero()[:, 0]
        target = allowed[torch.tensor([0, 1, -1, 7], device=device)]
        loss, dlogits = gradient(cross_entropy, logits, target)
        exact, exact_gradient = gradient(F.cross_entropy, logits.double(), target)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(dlogits.double(), exact_gradient, rtol=1e-2, atol=1e-6)
        assert (dlogits[:, columns] == 0).all()


def test_not_a_number_comes_through(device):
    for value in (torch.nan, torch.inf):
        logits = torch.randn(3, 5000, device=device)
        logits[1, 4321] = value
        target = torch.tensor([1, 2, 3], device=device)
        loss = cross_entropy(logits, target, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        # An ignored row is not even read.
        target[1] = -100
        loss, dlogits = gradient(cross_entropy, logits, target, reduction="none")
        assert loss[1] == 0 and (dlogits[1] == 0).all() and dlogits.isfinite().all()


def test_statistics(device):
    """The operator also returns the z-loss and the log-sum-exp; neither has a gradient."""
    logits = torch.randn(5, 30, device=device, requires_grad=True)
    target = torch.tensor([1, -100, 3, 4, 29], device=device)
    lse = torch.logsumexp(logits.detach(), 1).masked_fill(target == -100, 0)
    for reduction in ("none", "sum", "mean"):
        loss, z_loss, lse_out, *absent = torch.ops.liger.cross_entropy(
            logits, target, lse_square_scale=0.5, reduction=reduction
        )
        plain = torch.ops.liger.cross_entropy(logits, target, reduction=reduction)
        z = {"none": 0.5 * lse**2, "sum": 0.5 * (lse**2).sum(), "mean": 0.5 * (lse**2).sum() / 4}[reduction]
        torch.testing.assert_close(z_loss, z)
        torch.testing.assert_close(loss.detach(), plain[0].detach() + z)
        torch.testing.assert_close(lse_out, lse)
        assert loss.requires_grad and not z_loss.requires_grad and not lse_out.requires_grad
        assert plain[1].shape == plain[0].shape and (plain[1] == 0).all()
        assert [t.shape for t in absent] == [(0,), (0,)]


@pytest.mark.parametrize("ignore_index", [-1, 0, 7, 2**40])
def test_ignore_index(device, ignore_index):
    """It may be a class, or no possible one."""
    logits = torch.randn(6, 8, device=device)
    target = torch.tensor([0, 7, 3, 3, 0, 7], device=device)
    target[2] = ignore_index
    expected = gradient(F.cross_entropy, logits, target, ignore_index=ignore_index)
    torch.testing.assert_close(gradient(cross_entropy, logits, target, ignore_index=ignore_index), expected)


def test_float32_class_weights_beside_16_bit_logits(device):
    logits = torch.randn(6, 40, device=device).bfloat16()
    target, weight = torch.randint(40, (6,), device=device), torch.rand(40, device=device) + 0.1
    loss, dlogits = gradient(cross_entropy, logits, target, weight)
    exact, exact_gradient = gradient(F.cross_entropy, logits.double(), target, weight.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(dlogits.double(), exact_gradient, rtol=2**-8, atol=0)


def test_backward_operator_checks_its_targets():
    logits, lse, totals = torch.randn(2, 5), torch.zeros(2), torch.ones(3)
    with pytest.raises(IndexError, match="liger::cross_entropy_backward: target must be in"):
        torch.ops.liger.cross_entropy_backward(
            torch.ones(()),
            logits,
            torch.tensor([1, 5]),
            None,
            lse,
            lse,
            totals,
            -100,
            0.0,
            0.0,
            None,
            "mean",
            False,
        )
