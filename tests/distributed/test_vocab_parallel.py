"""Losses over a vocabulary that two processes share, against the reference on all classes in float64."""

import pytest
import torch
import torch.distributed as dist

from liger_ops.distributed import vocab_parallel_cross_entropy, vocab_parallel_fused_linear_cross_entropy
from liger_ops.functional import CrossEntropyOutput, cross_entropy, fused_linear_cross_entropy
from tests.reference.cross_entropy import cross_entropy as reference_cross_entropy
from tests.reference.fused_linear_cross_entropy import (
    fused_linear_cross_entropy as reference_fused_linear_cross_entropy,
)

TOKENS, HIDDEN, CLASSES = 37, 24, 50

OPTIONS = {
    "plain": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "smoothing": dict(label_smoothing=0.1),
    "all_smoothing": dict(label_smoothing=1.0, reduction="none"),
    "z_loss": dict(lse_square_scale=0.01),
    "softcap": dict(softcap=3.0),
    "ignore_index_of_a_class": dict(ignore_index=7),
    "num_items": dict(num_items=11),
    "token_scaling": dict(use_token_scaling=True),
    "everything": dict(
        label_smoothing=0.2, lse_square_scale=0.02, softcap=5.0, use_token_scaling=True, reduction="none"
    ),
    "extras": dict(
        label_smoothing=0.2,
        lse_square_scale=0.02,
        return_z_loss=True,
        return_token_accuracy=True,
        return_predicted_tokens=True,
    ),
}


def problem(dtype, bias=False):
    generator = torch.Generator().manual_seed(5)
    input = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(CLASSES, HIDDEN, generator=generator, dtype=torch.float64) * 0.5
    offset = torch.randn(CLASSES, generator=generator, dtype=torch.float64) if bias else None
    target = torch.randint(CLASSES, (TOKENS,), generator=generator)
    target[::5] = -100
    target[1:3] = 7
    # A row that is sure of its class, and one whose logits are large.
    weight[target[3]] += 4 * input[3]
    input[4] *= 30
    return [None if t is None else t.to(dtype) for t in (input, weight, offset)] + [target]


def shard_of(split):
    """This process's classes: evenly, or the first process has more."""
    first = CLASSES // 2 if split == "even" else 33
    start, stop = (0, first) if dist.get_rank() == 0 else (first, CLASSES)
    named = {} if split == "even" else dict(vocab_start=start, vocab_size=CLASSES)
    return slice(start, stop), named


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def compare(output, expected, limit):
    if isinstance(expected, CrossEntropyOutput):
        torch.testing.assert_close(output.z_loss.double(), expected.z_loss, rtol=limit, atol=limit)
        torch.testing.assert_close(output.token_accuracy.float(), expected.token_accuracy.float())
        assert torch.equal(output.predicted_tokens, expected.predicted_tokens)
        output, expected = output.loss, expected.loss
    torch.testing.assert_close(output.double(), expected, rtol=limit, atol=limit)
    return output, expected


LIMIT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def losses(dtype, split, ignore=-100):
    columns, named = shard_of(split)
    for name, options in OPTIONS.items():
        input, weight, bias, target = problem(dtype, bias=True)
        where = options.get("ignore_index", -100)
        target = torch.where(target == -100, where, target)
        upstream = torch.linspace(0.5, 2, TOKENS, dtype=torch.float64) if "none" in options.values() else None

        # Logits.
        logits = torch.addmm(bias, input, weight.t())
        exact = logits.double().clone().requires_grad_()
        reference_options = {k: v for k, v in options.items() if k != "num_items"}
        if "num_items" in options:
            reference_options["reduction"] = "sum"
        expected = reference_cross_entropy(exact, target, **reference_options)
        if "num_items" in options:
            expected = expected / options["num_items"]
        mine = logits[:, columns].clone().requires_grad_()
        before = mine.detach().clone()
        output = vocab_parallel_cross_entropy(mine, target, **named, **options)
        output, expected = compare(output, expected, LIMIT[dtype] if dtype == torch.float64 else 2e-6)
        grads = [1.0 if upstream is None else upstream.to(output.dtype)]
        output.backward(grads[0] if upstream is not None else None, retain_graph=True)
        first = mine.grad.clone()
        output.backward(grads[0] if upstream is not None else None)
        assert torch.equal(mine.grad, 2 * first) and torch.equal(before, mine.detach()), name
        expected.backward(upstream)
        error = relative(first, exact.grad[:, columns])
        assert error <= LIMIT[dtype] / 2, (name, "dlogits", error)

        # The head's product too, in one chunk and in several, as one process would have it.
        leaves = [t.double().clone().requires_grad_() for t in (input, weight, bias)]
        expected = reference_fused_linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], **options)
        for workspace in (None, 9 * 2 * len(range(*columns.indices(CLASSES))) * dtype.itemsize):
            x = input.clone().requires_grad_()
            w, b = (t[columns].clone().requires_grad_() for t in (weight, bias))
            output = vocab_parallel_fused_linear_cross_entropy(
                x, w, target, None, b, workspace_bytes=workspace, **named, **options
            )
            limit = LIMIT[dtype]
            if isinstance(output, CrossEntropyOutput) and dtype.itemsize == 2:
                # Rounded logits may have another maximum.
                output, wanted = output.loss, expected.loss
                torch.testing.assert_close(output.double(), wanted, rtol=limit, atol=limit)
            else:
                output, wanted = compare(output, expected, limit)
            for leaf in leaves:
                leaf.grad = None
            wanted.backward(upstream, retain_graph=True)
            output.backward(None if upstream is None else upstream.to(output.dtype))
            pairs = [(x, leaves[0].grad), (w, leaves[1].grad[columns]), (b, leaves[2].grad[columns])]
            for argument, (leaf, gradient) in zip(("input", "weight", "bias"), pairs, strict=True):
                error = relative(leaf.grad, gradient)
                assert error <= limit, (name, argument, error)


@pytest.mark.parametrize("split", ["even", "uneven"])
@pytest.mark.parametrize("dtype", LIMIT)
def test_losses(dtype, split, workers):
    workers(losses, dtype, split)


def same_as_one_process():
    """float32: as exact as the operators, and the same in every process, bit for bit."""
    columns, _ = shard_of("even")
    input, weight, _, target = problem(torch.float32)
    whole = [t.clone().requires_grad_() for t in (input, weight)]
    expected = fused_linear_cross_entropy(whole[0], whole[1], target)
    expected.backward()
    x, w = input.clone().requires_grad_(), weight[columns].clone().requires_grad_()
    loss = vocab_parallel_fused_linear_cross_entropy(x, w, target)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(x.grad, whole[0].grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(w.grad, whole[1].grad[columns], rtol=1e-5, atol=1e-7)
    logits = torch.mm(input, weight.t())
    torch.testing.assert_close(
        vocab_parallel_cross_entropy(logits[:, columns], target),
        cross_entropy(logits, target),
        rtol=2e-7,
        atol=0,
    )
    return loss.item(), x.grad


def test_every_process_has_the_same(workers):
    (loss, gradient), (other_loss, other_gradient) = workers(same_as_one_process)
    assert loss == other_loss
    assert torch.equal(gradient, other_gradient)


def corner_cases():
    columns, _ = shard_of("even")
    input, weight, _, target = problem(torch.float32)
    # Nothing counts.
    x, w = input.clone().requires_grad_(), weight[columns].clone().requires_grad_()
    loss = vocab_parallel_fused_linear_cross_entropy(x, w, torch.full_like(target, -100))
    loss.backward()
    assert loss == 0 and x.grad.count_nonzero() == 0 and w.grad.count_nonzero() == 0
    assert vocab_parallel_fused_linear_cross_entropy(x, w, target, num_items=0) == 0
    # No tokens.
    empty = vocab_parallel_fused_linear_cross_entropy(
        input[:0].requires_grad_(), w, target[:0], reduction="sum"
    )
    empty.backward()
    assert empty == 0
    # Masked classes: all of the second process's, say.
    logits = torch.mm(input, weight.t())
    logits[:, 25:] = -torch.inf
    target = target.where(target < 25, 3)
    mine = logits[:, columns].clone().requires_grad_()
    whole = logits.clone().requires_grad_()
    loss, expected = vocab_parallel_cross_entropy(mine, target), cross_entropy(whole, target)
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.grad, whole.grad[:, columns], rtol=1e-5, atol=1e-8)
    # Frozen arguments, and no gradients at all.
    input, weight, _, target = problem(torch.float32)
    for frozen in ("input", "weight"):
        x = input.clone().requires_grad_(frozen != "input")
        w = weight[columns].clone().requires_grad_(frozen != "weight")
        vocab_parallel_fused_linear_cross_entropy(x, w, target).backward()
        assert (x.grad is None) == (frozen == "input") and (w.grad is None) == (frozen == "weight")
    with torch.no_grad():
        assert not vocab_parallel_fused_linear_cross_entropy(x, w, target).requires_grad
    # The part of the input's gradient that comes from this process.
    x, w = input.clone().requires_grad_(), weight[columns].clone().requires_grad_()
    vocab_parallel_fused_linear_cross_entropy(x, w, target, reduce_input_gradient=False).backward()
    part = x.grad.clone()
    dist.all_reduce(part)
    x.grad = None
    vocab_parallel_fused_linear_cross_entropy(x, w, target).backward()
    torch.testing.assert_close(part, x.grad)
    # Autocast: products in bfloat16, gradients in float32.
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocab_parallel_fused_linear_cross_entropy(x, w, target)
    loss.backward()
    assert loss.dtype == torch.float32 and w.grad.dtype == torch.float32


def test_corner_cases(workers):
    workers(corner_cases)


def bad_calls():
    logits, target = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    weight = torch.randn(6, 5)
    op = "liger_ops.distributed.vocab_parallel_"
    with pytest.raises(IndexError, match=op + r"cross_entropy: target must be in \[0, 12\)"):
        vocab_parallel_cross_entropy(logits, target + 10)
    with pytest.raises(TypeError, match="must be int64"):
        vocab_parallel_cross_entropy(logits, target.int())
    with pytest.raises(ValueError, match=r"shape \[4\]"):
        vocab_parallel_cross_entropy(logits, target[:3])
    with pytest.raises(ValueError, match="reduction must be"):
        vocab_parallel_cross_entropy(logits, target, reduction="average")
    with pytest.raises(ValueError, match="no class"):
        vocab_parallel_cross_entropy(logits[:, :0], target)
    with pytest.raises(ValueError, match="go together"):
        vocab_parallel_cross_entropy(logits, target, vocab_start=3)
    with pytest.raises(ValueError, match=r"got \[4, 6\] and \[6, 5\]"):
        vocab_parallel_fused_linear_cross_entropy(logits, weight, target)
    with pytest.raises(TypeError, match="weight must be torch.float32"):
        vocab_parallel_fused_linear_cross_entropy(torch.randn(4, 5), weight.half(), target)


def test_bad_calls(workers):
    workers(bad_calls)


def four_shards():
    input, weight, _, target = problem(torch.float32)
    weight = weight[:48]
    target = target.where(target < 48, 0)
    columns = slice(12 * dist.get_rank(), 12 * dist.get_rank() + 12)
    whole = [t.clone().requires_grad_() for t in (input, weight)]
    fused_linear_cross_entropy(whole[0], whole[1], target).backward()
    x, w = input.clone().requires_grad_(), weight[columns].clone().requires_grad_()
    vocab_parallel_fused_linear_cross_entropy(x, w, target).backward()
    torch.testing.assert_close(x.grad, whole[0].grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(w.grad, whole[1].grad[columns], rtol=1e-5, atol=1e-7)


def test_four_shards(four_workers):
    four_workers(four_shards)


def compiled():
    columns, _ = shard_of("even")
    input, weight, _, target = problem(torch.float32)
    x, w = input.clone().requires_grad_(), weight[columns].clone().requires_grad_()
    function = torch.compile(vocab_parallel_fused_linear_cross_entropy, backend="aot_eager")
    loss = function(x, w, target)
    loss.backward()
    expected = [t.clone().requires_grad_() for t in (input, weight)]
    plain = fused_linear_cross_entropy(*expected, target)
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(w.grad, expected[1].grad[columns], rtol=1e-5, atol=1e-7)


def test_compiled(workers):
    workers(compiled)
