"""Log-probabilities where the vocabulary is sharded over processes, by ``torch.distributed``.

Every process has some columns of the logits, or rows of the head's weight, in the order of the
ranks; they may be unevenly many. What it gathers is four numbers a row and process, so that nothing
of the size of the logits moves, and nothing of the size of the vocabulary exists anywhere. All
processes call with the same ``index`` and options, and get the same values, bit for bit. Any
backend will do that has ``all_gather`` and ``all_reduce`` for the tensors' device.

With another means of communication the same takes a dozen lines: ``ppok_logprob_partial_*``, a
gather, ``ppok_logprob_merge_*`` and ``ppok_logprob_finish_*`` of the C library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _linear, _lists, _ops
from ._linear import Chunk, Gradients, Work
from ._ops import _LOGITS, _TARGETS, _addresses, _call
from .functional import LinearOutput, _skip, _skipped_index

__all__ = ["vocab_parallel_linear_logprobs", "vocab_parallel_logprobs"]

Group = dist.ProcessGroup | None


def vocab_parallel_logprobs(
    logits: Tensor,
    index: Tensor,
    group: Group = None,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    *,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen tokens and entropies from this process's columns of the logits.

    Args:
        logits: ``[..., columns]``, float32, float16 or bfloat16. Differentiable: the gradient of
            these columns, of a loss that all processes have.
        index: token ids ``[...]``, in the whole vocabulary.
        group: the processes that have its columns; all if it is None.
        temperature: divides the logits.
        row_mask: ``[...]``; rows where it is 0 are not read and give 0.
        ignore_index: rows with this id are not read and give 0.

    Returns:
        Log-probabilities and entropies in nats, float32, ``[...]`` each, with gradients.
    """
    index, ignore_index = _skip(_OP, logits, index, row_mask, ignore_index)
    return _Logits.apply(logits, index, group, (float(temperature), ignore_index))


def vocab_parallel_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    group: Group = None,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> LinearOutput:
    """:func:`ppo_kernels.linear_logprobs` with the entropy, from this process's rows of the head's
    weight.

    Args:
        hidden: ``[..., hidden_size]``, the same in all processes. Differentiable: its gradient is
            summed over them.
        weight: ``[columns, hidden_size]``. Differentiable, and so is ``bias``, ``[columns]``.
        index: token ids ``[...]``, in the whole vocabulary.
        group: the processes that have its columns; all if it is None.
        temperature: divides the logits: one number.
        row_mask, ignore_index, logit_scale, softcap: as there.

    Returns:
        The log-probabilities and entropies.
    """
    op = _lists.LINEAR.name
    index, ignore_index = _skipped_index(op, index, row_mask, ignore_index)
    options = (float(temperature), ignore_index, logit_scale, softcap, 1.0)
    hidden = _linear.autocast(hidden)
    return LinearOutput(*_Linear.apply(hidden, weight, bias, index, group, options))


_OP = "vocab_parallel_logprobs"


def _shard(check: Callable[[], int], like: Tensor, group: Group) -> tuple[int, int]:
    """The id of this process's first column, and how many columns there are in all, of what each
    process's ``check`` says that it has. If one refuses, all do: none is left waiting."""
    refused = None
    try:
        columns = check()
    except ValueError as error:
        refused, columns = error, -1
    mine = torch.tensor([columns], device=like.device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    counts = torch.cat(every).tolist()
    if refused is not None:
        raise refused
    if -1 in counts:
        raise ValueError(f"vocab_parallel: refused by process {counts.index(-1)} of the group")
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def _merge(sums: Tensor, options: tuple, group: Group) -> None:
    """Makes running sums ``[4, N]`` over a process's columns those over all, in the order of the
    ranks."""
    every = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, sums.contiguous(), group=group)
    sums.copy_(every[0])
    for other in every[1:]:
        addresses = _addresses((*other, *sums))
        _call(_lists.logprob_merge, sums, options, sums.shape[1], *addresses)


def _no_columns(sums: Tensor) -> None:
    largest, rest, logit, weighted = sums
    largest.fill_(-torch.inf)
    rest.zero_()
    logit.fill_(torch.nan)
    weighted.zero_()


def _without_autocast(function: Callable) -> Callable:
    """A pass whose products are in the dtypes of their arguments."""

    @functools.wraps(function)
    def without(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *rest)

    return without


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, index: Tensor, group: Group, options: tuple
    ) -> tuple[Tensor, Tensor]:
        temperature, ignore_index = options

        def check() -> int:
            _ops.check_logprob(_OP, logits, index)
            _lists.check_positive(_OP, "temperature", temperature)
            return logits.shape[-1]

        first, vocab = _shard(check, logits, group)
        # What one process refuses all must, or the others would wait: so it is asked here.
        if index.is_cpu:
            _linear.check_targets(_OP, index.reshape(-1), vocab, ignore_index)
        columns, rows = logits.shape[-1], index.numel()
        # The library reads int32 as uint32.
        index = index.contiguous() if ignore_index is None else index.long().contiguous()
        logits = logits.contiguous()
        sums = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
        if columns:
            shard = logits.view(rows, columns)
            _linear.fold(shard, index, tuple(sums), (first, vocab), True, options)
        else:
            _no_columns(sums)
        _merge(sums, options, group)
        logp, log_sum, entropy = _linear.finish(index, tuple(sums), vocab, options)
        types = (_LOGITS[logits.dtype], _TARGETS[index.dtype])
        ctx.save_for_backward(logits, index, sums[0].clone(), log_sum, entropy)
        ctx.known = ((rows, columns, first, vocab, *types), options)
        return logp.view(index.shape).clone(), entropy.view(index.shape).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        sizes, options = ctx.known
        logits, index, largest, log_sum, entropy = ctx.saved_tensors
        grad = torch.empty_like(logits)
        if logits.numel():
            upstream = (grad_logp.contiguous(), grad_entropy.contiguous())
            addresses = _addresses((logits, index, largest, log_sum, entropy, *upstream, grad))
            _call(_lists.logprob_tile_backward, logits, options, *sizes, *addresses)
        return grad, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        group: Group,
        options: tuple,
    ) -> tuple[Tensor, Tensor]:
        tensors = (hidden, weight, index, bias, None, None, None)

        def check() -> int:
            _linear.check(tensors, some_columns=True)
            return len(weight)

        shard = _shard(check, hidden, group)
        work = Work.of(tensors, options, shard)
        found = torch.empty(4, len(work.index), dtype=torch.float32, device=hidden.device)
        for rows in work.chunks():
            chunk = Chunk(work, rows, (True, False, False, False))
            if len(weight):
                chunk.fold()
            else:
                _no_columns(chunk.sums)
            _merge(chunk.sums, work.options, group)
            found[:, rows] = torch.stack(chunk.finish()[:4])
        logp, *known = found
        ctx.save_for_backward(*tensors[:4], *known)
        ctx.known = (options, shard, group)
        return work.spread(logp, index).clone(), work.spread(known[2], index).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        options, shard, group = ctx.known
        *tensors, largest, log_sum, entropy = ctx.saved_tensors
        hidden, weight, index, bias = tensors
        work = Work.of((*tensors, None, None, None), options, shard)
        wants = ctx.needs_input_grad[:3]
        grads = [
            _linear.gradient_of(tensor, wanted, hidden)
            for tensor, wanted in zip((hidden, weight, bias), wants)
        ]
        # Summed in float32 over the processes too.
        grads[0] = torch.zeros_like(grads[0], dtype=torch.float32)
        if len(weight):
            known = [largest, log_sum, entropy, work.gather(grad_logp), work.gather(grad_entropy)]
            nothing = torch.empty(0, dtype=hidden.dtype, device=hidden.device)
            Gradients(work, *grads, nothing, nothing).write(known)
        if wants[0]:
            dist.all_reduce(grads[0], group=group)
        grads[0] = grads[0].to(hidden.dtype)
        found = [grad if wanted else None for grad, wanted in zip(grads, wants)]
        return *found, None, None, None
