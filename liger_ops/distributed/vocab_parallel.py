"""Cross entropy whose classes are spread over the processes of a group, as a column-parallel head has them.

Each process takes the statistics of its own columns; a maximum and a sum over the group, of a number per
token each, make them those of the whole row. Logits are never gathered. The row kernels are those of
`liger::cross_entropy`: its forward gives the log-sum-exp of a shard, its backward takes that of the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from liger_ops._numbers import one_number
from liger_ops.functional import CrossEntropyOutput

_forward = torch.ops.liger.cross_entropy_forward.default
_backward = torch.ops.liger.cross_entropy_backward.default
_scale = torch.ops.liger.cross_entropy_scale.default
_scale_ = torch.ops.liger.cross_entropy_scale_.default

# What the row kernels are told to ignore: the caller's ignore_index may be a column of some shard.
_IGNORED = -100


@dataclass(frozen=True)
class _Loss:
    """The shard that this process has, and the options of the loss."""

    group: dist.ProcessGroup
    start: int
    classes: int
    label_smoothing: float
    lse_square_scale: float
    softcap: float | None
    use_token_scaling: bool
    predict: bool

    def all_reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return collectives.all_reduce(tensor, reduction, self.group)


@dataclass
class _Rows:
    """Of some rows: the targets in this shard and what the whole rows are known by."""

    column: Tensor  # the target's column here, or 0
    inside: Tensor  # whether the target is in this shard
    ignored: Tensor
    loss: Tensor
    z_loss: Tensor
    lse: Tensor
    lse_low: Tensor
    scale: Tensor | None  # factors of token scaling
    predicted: Tensor | None


def _columns(loss: _Loss, target: Tensor, ignored: Tensor, width: int) -> tuple[Tensor, Tensor]:
    column = target - loss.start
    inside = (column >= 0) & (column < width) & ~ignored
    return column.where(inside, 0), inside


def _soft_capped(loss: _Loss, logits: Tensor) -> Tensor:
    return logits if loss.softcap is None else loss.softcap * torch.tanh(logits / loss.softcap)


def _statistics(loss: _Loss, logits: Tensor, target: Tensor, ignored: Tensor) -> _Rows:
    """The losses of the rows, and what their gradient needs."""
    width = logits.shape[1]
    column, inside = _columns(loss, target, ignored, width)
    smoothing = loss.label_smoothing > 0
    # With all of the target spread evenly, the loss of a shard is its log-sum-exp less its mean.
    spread, _, lse, _, predicted, lse_low, _, _ = _forward(
        logits,
        column.where(~ignored, _IGNORED),
        None,
        _IGNORED,
        1.0 if smoothing else 0.0,
        0.0,
        loss.softcap,
        "none",
        None,
        False,
        False,
        loss.predict,
        False,
    )
    at_column = logits.gather(1, column.unsqueeze(1)).squeeze(1).to(lse.dtype)
    highest = loss.all_reduce(lse, "max")
    # A shard of nothing but -inf adds nothing.
    lse_low = lse_low.masked_fill(lse == -math.inf, 0)
    shares = torch.exp((lse.double() - highest) + lse_low)
    y_target = _soft_capped(loss, at_column).where(inside, 0).double()
    parts = [shares, y_target]
    if smoothing:
        parts.append((lse.double() - spread) * width)
    sums = loss.all_reduce(torch.stack(parts), "sum")

    exact = highest + torch.log(sums[0])
    row_lse = exact.to(lse.dtype)
    row_low = (exact - row_lse).to(lse.dtype)
    neg_log_p = exact - sums[1]
    per_row = neg_log_p
    if smoothing:
        mean = sums[2] / loss.classes
        per_row = (1 - loss.label_smoothing) * neg_log_p + loss.label_smoothing * (exact - mean)
    z_loss = loss.lse_square_scale * exact * exact
    scale = None
    if loss.use_token_scaling:
        scale = torch.exp(-neg_log_p)
        per_row, z_loss = per_row * scale, z_loss * scale
    per_row = (per_row + z_loss).masked_fill(ignored, 0).to(lse.dtype)
    z_loss = z_loss.masked_fill(ignored, 0).to(lse.dtype)
    if loss.predict:
        predicted = _predicted(loss, logits, predicted, ignored)
    return _Rows(
        column,
        inside,
        ignored,
        per_row,
        z_loss,
        row_lse,
        row_low,
        None if scale is None else scale.to(lse.dtype),
        predicted if loss.predict else None,
    )


def _predicted(loss: _Loss, logits: Tensor, here: Tensor, ignored: Tensor) -> Tensor:
    """The class of the largest logit, the first of several."""
    here = here.clamp(min=0)
    value = logits.gather(1, here.unsqueeze(1)).squeeze(1).float()
    largest = loss.all_reduce(value, "max")
    candidate = (here + loss.start).where(value == largest, loss.classes)
    return loss.all_reduce(candidate, "min").masked_fill(ignored, -1)


def _logits_gradient(loss: _Loss, logits: Tensor, rows: _Rows, dloss: Tensor) -> Tensor:
    """Of this shard's logits, for an upstream gradient of each row."""
    width = logits.shape[1]
    if rows.scale is not None:
        dloss = dloss * rows.scale
    # The operator divides the smoothing by its own number of columns. Divisors are 1, and the sum of the
    # class weights is what makes the factor of the probability 1.
    smoothing = loss.label_smoothing * width / loss.classes
    totals = torch.ones(3, dtype=rows.lse.dtype, device=logits.device)
    totals[2].fill_(width)
    gradient = _backward(
        dloss,
        logits,
        rows.column.where(~rows.ignored, _IGNORED),
        None,
        rows.lse,
        rows.lse_low,
        totals,
        _IGNORED,
        smoothing,
        loss.lse_square_scale,
        loss.softcap,
        "none",
        False,
    )
    # It took `column` for every row's target, which is right for those in this shard without smoothing.
    column = rows.column.unsqueeze(1)
    y = _soft_capped(loss, logits.gather(1, column).squeeze(1).to(rows.lse.dtype))
    log_p = (y - rows.lse) - rows.lse_low
    p = torch.exp(log_p)
    # Where p is near 1, its distance from 1 keeps its digits.
    at_column = (torch.expm1(log_p) + loss.label_smoothing).where(rows.inside, p)
    at_column = at_column - loss.label_smoothing / loss.classes + 2 * loss.lse_square_scale * rows.lse * p
    if loss.softcap is not None:
        at_column = at_column * (1 - y / loss.softcap) * (1 + y / loss.softcap)
    at_column = (at_column * dloss).masked_fill(rows.ignored, 0)
    return gradient.scatter_(1, column, at_column.unsqueeze(1).to(gradient.dtype))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignored: Tensor, loss: _Loss) -> tuple:
        rows = _statistics(loss, logits, target, ignored)
        scale = () if rows.scale is None else (rows.scale,)
        ctx.save_for_backward(logits, target, ignored, rows.lse, rows.lse_low, *scale)
        ctx.loss = loss
        predicted = target if rows.predicted is None else rows.predicted
        ctx.mark_non_differentiable(rows.z_loss, predicted)
        return rows.loss, rows.z_loss, predicted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple:
        logits, target, ignored, lse, lse_low, *scale = ctx.saved_tensors
        rows = _known_rows(ctx.loss, target, ignored, lse, lse_low, logits.shape[1], *scale)
        return _logits_gradient(ctx.loss, logits, rows, dloss), None, None, None


def _known_rows(
    loss: _Loss,
    target: Tensor,
    ignored: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    width: int,
    scale: Tensor | None = None,
) -> _Rows:
    """What backward needs of rows whose statistics were taken before."""
    column, inside = _columns(loss, target, ignored, width)
    return _Rows(column, inside, ignored, lse, lse, lse, lse_low, scale, None)


@dataclass
class _Linear:
    """The matrix products around the loss, over as many rows at a time as the workspace takes."""

    loss: _Loss
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype
    accumulate: torch.dtype | None
    workspace: int | None
    reduce_dinput: bool
    need: tuple[bool, bool, bool]  # of input, weight, bias

    def chunks(self) -> list[slice]:
        tokens, width = self.input.shape[0], self.weight.shape[0]
        workspace = self.workspace
        if workspace is None:
            on_cuda = self.input.device.type == "cuda"
            workspace = 2**29 if on_cuda else max(2**26, self.weight.nbytes // 4)
        # The logits and their gradient.
        most = max(1, workspace // max(1, 2 * width * self.compute.itemsize))
        count = -(-tokens // most)
        rows = -(-tokens // max(1, count))
        rows = min(most, -(-rows // 128) * 128)
        return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, max(1, rows))]

    def run(
        self, target: Tensor, ignored: Tensor, dloss: Tensor | None, saved: tuple[Tensor, ...] = ()
    ) -> tuple:
        """Losses, z losses, predictions, lse, lse_low, scale per row; and the gradients for ``dloss``.

        ``saved``: lse, lse_low and scale of rows whose statistics were taken before.
        """
        input, weight = self.input.to(self.compute), self.weight.to(self.compute)
        bias = None if self.bias is None else self.bias.to(self.compute)
        dinputs: list[Tensor] = []
        dweight = dbias = None
        wide = torch.float64 if self.compute == torch.float64 else torch.float32
        if dloss is not None and self.need[1]:
            dweight = torch.zeros_like(weight, dtype=self.accumulate or self.weight.dtype)
        if dloss is not None and self.need[2]:
            dbias = torch.zeros(weight.shape[:1], dtype=wide, device=weight.device)
        results: list[_Rows] = []
        for chunk in self.chunks():
            x = input[chunk]
            logits = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
            if saved:
                known = [tensor[chunk] for tensor in saved]
                rows = _known_rows(
                    self.loss, target[chunk], ignored[chunk], *known[:2], len(weight), *known[2:]
                )
            else:
                rows = _statistics(self.loss, logits, target[chunk], ignored[chunk])
            results.append(rows)
            if dloss is None:
                continue
            gradient = _logits_gradient(self.loss, logits, rows, dloss[chunk])
            del logits
            if self.need[0]:
                dinput = torch.mm(gradient, weight)
                # In the background, while the next chunk is computed.
                dinputs.append(self.loss.all_reduce(dinput, "sum") if self.reduce_dinput else dinput)
            if dweight is not None:
                _add_product(dweight, gradient.t(), x)
            if dbias is not None:
                dbias += gradient.sum(0, dtype=wide)
            del gradient
        dinput = None
        if dloss is not None and self.need[0]:
            dinput = torch.cat(dinputs).to(self.input.dtype) if dinputs else torch.zeros_like(self.input)
        if dweight is not None:
            dweight = dweight.to(self.weight.dtype)
        if dbias is not None:
            dbias = dbias.to(self.bias.dtype)
        return results, (dinput, dweight, dbias)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` in out's dtype."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.dtype == torch.float32 and a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 0):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _joined(parts: list[Tensor | None], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like.new_zeros(0)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """The losses of the rows. ``summed``: their sum, with the gradients computed along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignored: Tensor,
        linear: _Linear,
        summed: bool,
    ) -> tuple:
        wide = torch.float64 if linear.compute == torch.float64 else torch.float32
        stats = torch.empty(0, dtype=wide, device=input.device)
        ones = stats.new_ones(target.shape) if summed and any(linear.need) else None
        results, gradients = linear.run(target, ignored, ones)
        loss = _joined([rows.loss for rows in results], stats)
        z_loss = _joined([rows.z_loss for rows in results], stats)
        predicted = target
        if linear.loss.predict:
            predicted = _joined([rows.predicted for rows in results], target)
        ctx.linear, ctx.summed = linear, summed
        if summed:
            ctx.save_for_backward(*gradients)
        else:
            scale = ()
            if linear.loss.use_token_scaling:
                scale = (_joined([rows.scale for rows in results], stats),)
            lse = _joined([rows.lse for rows in results], stats)
            lse_low = _joined([rows.lse_low for rows in results], stats)
            ctx.save_for_backward(input, weight, bias, target, ignored, lse, lse_low, *scale)
        # The arguments are kept by save_for_backward or not at all.
        linear.input = linear.weight = linear.bias = None
        ctx.mark_non_differentiable(z_loss, predicted)
        return loss.double().sum().to(wide) if summed else loss, z_loss, predicted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple:
        nothing = (None, None, None, None)
        if ctx.summed:
            last_use = not torch._C._autograd._get_current_graph_task_keep_graph()
            scaled = []
            for gradient in ctx.saved_tensors:
                if gradient is None or not last_use:
                    scaled.append(gradient if gradient is None else _scale(gradient, dloss))
                else:
                    _scale_(gradient, dloss)
                    scaled.append(gradient)
            return (*scaled, *nothing)
        input, weight, bias, target, ignored, *saved = ctx.saved_tensors
        linear = ctx.linear
        linear.input, linear.weight, linear.bias = input, weight, bias
        _, gradients = linear.run(target, ignored, dloss, tuple(saved))
        linear.input = linear.weight = linear.bias = None
        return (*gradients, *nothing)


def _checked(op: str, target: Tensor, rows: int, classes: int, ignore_index: int) -> Tensor:
    """Which targets are ignored, all others being in range."""
    if target.dtype != torch.int64:
        raise TypeError(f"liger_ops.distributed.{op}: target must be int64, got {target.dtype}")
    if target.shape != (rows,):
        raise ValueError(
            f"liger_ops.distributed.{op}: target must have shape [{rows}], got {list(target.shape)}"
        )
    ignored = target == ignore_index
    fits = ignored | ((target >= 0) & (target < classes))
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(fits.all()):
            wrong = int(target[~fits][0])
            raise IndexError(
                f"liger_ops.distributed.{op}: target must be in [0, {classes}) or ignore_index "
                f"{ignore_index}, got {wrong}"
            )
    else:
        torch._assert_async(
            fits.all(), f"liger_ops.distributed.{op}: target must be in [0, {classes}) or ignore_index"
        )
    return ignored


def _loss_options(
    op: str,
    width: int,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
    vocab_size: int | None,
    reduction: str,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float | None,
    use_token_scaling: bool,
    predict: bool,
) -> _Loss:
    name = f"liger_ops.distributed.{op}"
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{name}: reduction must be "mean", "sum" or "none", got "{reduction}"')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap must be positive, got {softcap}")
    if not dist.is_initialized():
        raise RuntimeError(f"{name}: needs torch.distributed.init_process_group first")
    if width == 0:
        raise ValueError(f"{name}: this process has no class; spread the classes over fewer processes")
    if (vocab_start is None) != (vocab_size is None):
        raise ValueError(f"{name}: vocab_start and vocab_size go together")
    group = group or dist.group.WORLD
    if vocab_start is None:
        vocab_start, vocab_size = dist.get_rank(group) * width, dist.get_world_size(group) * width
    return _Loss(
        group, vocab_start, vocab_size, label_smoothing, lse_square_scale, softcap, use_token_scaling, predict
    )


def _output(
    loss: Tensor,
    z_loss: Tensor,
    predicted: Tensor,
    target: Tensor,
    ignored: Tensor,
    reduction: str,
    num_items: Tensor | float | None,
    return_z_loss: bool,
    return_token_accuracy: bool,
    return_predicted_tokens: bool,
) -> Tensor | CrossEntropyOutput:
    """Reduces losses of rows, or divides their sum."""
    if reduction != "none":
        loss = loss.double().sum().to(loss.dtype) if loss.dim() else loss
        z_loss = z_loss.double().sum().to(z_loss.dtype)
    if reduction == "mean":
        if num_items is None:
            num_items = (~ignored).sum()
        divisor = one_number(num_items, loss.device, loss.dtype).detach()
        # 0 stands for "no target counts": loss and gradient are 0.
        counts = divisor != 0
        divisor = divisor.where(counts, 1)
        loss, z_loss = loss / divisor * counts, z_loss / divisor * counts
    if not (return_z_loss or return_token_accuracy or return_predicted_tokens):
        return loss
    accuracy = None
    if return_token_accuracy:
        accuracy = ((predicted == target) & ~ignored).float()
        if reduction != "none":
            accuracy = accuracy.double().sum().div((~ignored).sum().clamp(min=1)).float()
    return CrossEntropyOutput(
        loss, z_loss if return_z_loss else None, accuracy, predicted if return_predicted_tokens else None
    )


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    num_items: Tensor | float | None = None,
    use_token_scaling: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`liger_ops.functional.cross_entropy` of logits whose columns are spread over a process group.

    Every process of the group calls it with the same targets and options, and gets the same loss.

    Args:
        logits: `[tokens, classes of this process]`.
        target: `[tokens]`, int64, of all classes, or `ignore_index`.
        group: the processes that share the columns; by default all.
        vocab_start: the first class of this process, and
        vocab_size: the number of all classes. By default the processes have equally many, in rank order.
        num_items: with `"mean"`, what the sum is divided by, as in `fused_linear_cross_entropy`.
        ignore_index, reduction, label_smoothing, lse_square_scale, softcap, use_token_scaling, return_z_loss,
            return_token_accuracy, return_predicted_tokens: as in `liger_ops.functional.cross_entropy`.

    Returns:
        As `liger_ops.functional.cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `liger_ops.functional.cross_entropy`; ValueError where this
            process has no class.

    Communication:
        An all-reduce (maximum) of one and one (sum) of two or three numbers a token, in forward; two more of
        one number for predicted tokens. None in backward.

    Saves:
        The logits of this process, the target, and two numbers a token.
    """
    op = "vocab_parallel_cross_entropy"
    if logits.dim() != 2:
        raise ValueError(f"liger_ops.distributed.{op}: logits must be 2-D, got {list(logits.shape)}")
    loss = _loss_options(
        op,
        logits.shape[1],
        group,
        vocab_start,
        vocab_size,
        reduction,
        label_smoothing,
        lse_square_scale,
        softcap,
        use_token_scaling,
        return_token_accuracy or return_predicted_tokens,
    )
    ignored = _checked(op, target, logits.shape[0], loss.classes, ignore_index)
    per_row, z_loss, predicted = _CrossEntropy.apply(logits, target, ignored, loss)
    wanted = (return_z_loss, return_token_accuracy, return_predicted_tokens)
    return _output(per_row, z_loss, predicted, target, ignored, reduction, num_items, *wanted)


def vocab_parallel_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    *,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    num_items: Tensor | float | None = None,
    accum_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    use_token_scaling: bool = False,
    reduce_input_gradient: bool = True,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`liger_ops.functional.fused_linear_cross_entropy` with a weight whose rows are spread over a group.

    Every process of the group calls it with the same input, targets and options, and gets the same loss. The
    logits of no process are held whole, and none are exchanged.

    Args:
        input: `[tokens, hidden]`, the same in every process.
        weight: `[classes of this process, hidden]`.
        target, group, vocab_start, vocab_size: as in `vocab_parallel_cross_entropy`.
        bias: `[classes of this process]`.
        reduce_input_gradient: sum the input's gradient over the group. Without, each process gets the part
            that comes from its classes, for a caller that sums or scatters it.
        ignore_index, reduction, label_smoothing, lse_square_scale, softcap, num_items, accum_dtype,
            workspace_bytes, use_token_scaling, return_z_loss, return_token_accuracy, return_predicted_tokens:
            as in `liger_ops.functional.fused_linear_cross_entropy`. float16 accumulates in float32.

    Returns:
        As `liger_ops.functional.fused_linear_cross_entropy`.

    Raises:
        As `vocab_parallel_cross_entropy`; ValueError where input, weight and bias do not fit.

    Communication:
        That of `vocab_parallel_cross_entropy` for each chunk of rows, and the sum of the input's gradient.

    Saves:
        For `"mean"` and `"sum"` the gradients that were asked for; for `"none"` the arguments and two numbers
        a token.
    """
    op = "vocab_parallel_fused_linear_cross_entropy"
    name = f"liger_ops.distributed.{op}"
    if input.dim() != 2 or weight.dim() != 2 or input.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: input must be [tokens, hidden] and weight [classes, hidden], got {list(input.shape)} "
            f"and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
        raise TypeError(f"{name}: weight must be {input.dtype}, as input, got {weight.dtype}")
    if accum_dtype not in (None, torch.float32, weight.dtype):
        raise TypeError(f"{name}: accum_dtype must be float32 or the weight's dtype, got {accum_dtype}")
    loss = _loss_options(
        op,
        weight.shape[0],
        group,
        vocab_start,
        vocab_size,
        reduction,
        label_smoothing,
        lse_square_scale,
        softcap,
        use_token_scaling,
        return_token_accuracy or return_predicted_tokens,
    )
    ignored = _checked(op, target, input.shape[0], loss.classes, ignore_index)
    compute = input.dtype
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        compute = torch.get_autocast_dtype(input.device.type)
    if compute == torch.float16 and accum_dtype is None:
        # The gradients are divided by the number of tokens only when they are summed up.
        accum_dtype = torch.float32
    if weight.dtype == torch.float64:
        accum_dtype = torch.float64
    need = tuple(
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (input, weight, bias)
    )
    linear = _Linear(
        loss,
        input.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        compute,
        accum_dtype,
        workspace_bytes,
        reduce_input_gradient,
        need,
    )
    with torch.autocast(input.device.type, enabled=False):
        per_row, z_loss, predicted = _FusedLinearCrossEntropy.apply(
            input, weight, bias, target, ignored, linear, reduction != "none"
        )
    wanted = (return_z_loss, return_token_accuracy, return_predicted_tokens)
    return _output(per_row, z_loss, predicted, target, ignored, reduction, num_items, *wanted)
