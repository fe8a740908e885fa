"""What is special about cross entropy; the contract is in test_loss_contract.py."""

import itertools
from functools import partial

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


@pytest.mark.parametrize("items", [7, torch.tensor([7]), torch.tensor(7.0)], ids=["number", "int", "float"])
def test_num_items(device, items):
    """It replaces the divisor of the mean, of the z-loss too."""
    logits = torch.randn(5, 30, device=device)
    target = torch.tensor([1, -100, 3, 4, 29], device=device)
    summed = partial(cross_entropy, reduction="sum", lse_square_scale=0.5)
    ours = gradient(partial(cross_entropy, num_items=items, lse_square_scale=0.5), logits, target)
    expected = gradient(lambda *args: summed(*args) / 7, logits, target)
    torch.testing.assert_close(ours, expected)
    details = cross_entropy(logits, target, num_items=items, lse_square_scale=0.5, return_z_loss=True)
    torch.testing.assert_close(details.z_loss, summed(logits, target, return_z_loss=True).z_loss / 7)


def test_num_items_replaces_the_divisor_of_the_mean(device):
    logits, target = torch.randn(2, 5, device=device), torch.tensor([1, 2], device=device)
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match='num_items replaces the divisor of reduction "mean", got'):
            cross_entropy(logits, target, num_items=7, reduction=reduction)
    with pytest.raises(ValueError, match=r"cross_entropy: num_items must have one element, got shape \[2\]"):
        torch.ops.liger.cross_entropy(logits, target, num_items=torch.ones(2, device=device))
    with pytest.raises(NotImplementedError, match="gradient with respect to num_items is not implemented"):
        cross_entropy(logits, target, num_items=torch.ones((), device=device, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [33, 4096, 32008])
def test_gradient_computed_with_the_loss(device, dtype, classes):
    """Forward, where its gradient is needed, and backward write the same one."""
    logits = torch.randn(9, classes, device=device).to(dtype)
    target = torch.randint(classes, (9,), device=device)
    target[4] = -100
    items = torch.tensor(5.0, device=device)
    options = (-100, 0.0, 1e-4, None, "mean")
    loss, _, lse, _, _, lse_low, totals, dlogits = torch.ops.liger.cross_entropy_forward(
        logits, target, None, *options, items, False, False, False, True
    )
    plain = torch.ops.liger.cross_entropy_forward(
        logits, target, None, *options, items, False, False, False, False
    )
    assert torch.equal(loss, plain[0]) and plain[-1].shape == (0,)
    expected = torch.ops.liger.cross_entropy_backward(
        torch.ones((), device=device), logits, target, None, lse, lse_low, totals, *options, False
    )
    assert dlogits.dtype == dtype and (dlogits[4] == 0).all()
    torch.testing.assert_close(dlogits, expected, rtol=torch.finfo(dtype).eps, atol=0)


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


@pytest.mark.gpu
class TestOnePass:
    """bfloat16 logits that a GPU can keep on the chip: their gradient is computed together with the loss."""

    @pytest.fixture
    def logits(self):
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("needs 65 KiB of shared memory a block")
        return torch.randn(64, 4096, device="cuda").bfloat16().requires_grad_()

    @pytest.fixture
    def target(self):
        target = torch.randint(4096, (64,), device="cuda")
        target[5] = -100
        return target

    def test_where(self, logits, target):
        def node(x=logits, **options):
            loss = cross_entropy(x, target, **options)
            return (loss if isinstance(loss, torch.Tensor) else loss.loss).grad_fn.name()

        one, two = "CrossEntropyOnePassBackward", "CrossEntropyBackward"
        weight = torch.ones(4096, device="cuda")
        for options in ({}, dict(reduction="sum"), dict(lse_square_scale=0.1), dict(use_token_scaling=True)):
            assert one in node(**options) and one in node(weight=weight, return_z_loss=True, **options)
        others = [dict(reduction="none"), dict(softcap=30.0), dict(label_smoothing=0.1)]
        for options in (*others, dict(return_token_accuracy=True), dict(return_predicted_tokens=True)):
            assert one not in node(**options) and two in node(**options)
        # Dtypes that have no such kernel, or cannot hold a gradient without its factor; rows of odd lengths.
        target.clamp_(max=4094)
        for x in (logits.float(), logits.half(), logits[:, :4095]):
            assert one not in node(x)

    @pytest.mark.parametrize("upstream", [1.0, 4.0, 0.3])
    def test_upstream(self, logits, target, upstream):
        """A power of two scales exactly; others round once more."""
        _, expected = gradient(F.cross_entropy, logits.double(), target)
        (upstream * cross_entropy(logits, target)).backward()
        error = (logits.grad.double() / upstream - expected).norm() / expected.norm()
        assert error < (2**-9 if upstream != 0.3 else 2**-8)
        _, alone = gradient(cross_entropy, logits, target)
        if upstream != 0.3:
            assert torch.equal(logits.grad, upstream * alone)

    def test_passes(self, logits, target):
        """The saved gradient outlives passes over a graph that is kept, and its memory is given out once."""
        loss = cross_entropy(logits, target)
        first, second = (torch.autograd.grad(3 * loss, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        (last,) = torch.autograd.grad(3 * loss, logits)
        assert torch.equal(last, first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, logits)

    def test_memory(self, logits, target):
        """Backward takes none: what forward wrote is the gradient."""
        cross_entropy(logits, target).backward()
        logits.grad = None
        loss = 0.3 * cross_entropy(logits, target)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        assert torch.cuda.max_memory_allocated() - before < logits.nbytes // 4

    def test_not_differentiable_twice(self, logits, target):
        (first,) = torch.autograd.grad(cross_entropy(logits, target), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            first.sum().backward()

    def test_compiled(self, logits, target):
        """A graph, which could not multiply in place, reads the logits twice."""
        expected = gradient(cross_entropy, logits, target)
        ours = gradient(torch.compile(cross_entropy, fullgraph=True), logits, target)
        torch.testing.assert_close(ours, expected)

    def test_strides_and_alignment(self, target):
        wide = torch.randn(64, 4096 + 24, device="cuda").bfloat16()
        for start in (0, 1, 8):
            logits = wide[:, start : start + 4096]
            expected = gradient(cross_entropy, logits.contiguous(), target)
            leaf = wide.clone().requires_grad_()
            loss = cross_entropy(leaf[:, start : start + 4096], target)
            loss.backward()
            torch.testing.assert_close(loss.detach(), expected[0])
            torch.testing.assert_close(leaf.grad[:, start : start + 4096], expected[1])
