"""From hidden states to log-probabilities: the product with the head's weight by tiles, each of
which is reduced before the next one is made. What goes in, what comes out, and what never exists:

    forward, a tile      hidden [N, H] @ weight[v : v + w].T    logits [N, w]
                         folded into running sums               [4, N]
    forward, the end     running sums                           logp, entropy, two statistics [N]
    backward, a tile     the product again                      logits [N, w]
                         gradient in their place                [N, w]
                         gradient @ weight[v : v + w]           added to grad_hidden [N, H], float32
                         gradient.T @ hidden                    grad_weight[v : v + w]
    never                                                       [N, V]

Products are torch's, in the dtype of the hidden states. Their result is float32 on CUDA; on the
CPU, where torch has no such product, it has the dtype of the hidden states, and so is rounded once.
Rows that are ignored take no part in any product.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _lists
from ._lists import refuse
from ._ops import (
    _LOGITS,
    _TARGETS,
    Results,
    _addresses,
    _call,
    _checked,
    _op,
    _refuse_dtype,
    call,
    check_device,
)

# Rows of hidden states that go through the head together: the weight is read once for them.
ROWS = 8192
# A tile of logits, of which there is one at a time: on a CPU it is to stay in the caches.
TILE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
_LEAST_COLUMNS = 1024


class Head(NamedTuple):
    """A head's weight and what is done to its logits before they are compared."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    row_temperature: Tensor | None
    dtype: torch.dtype
    # Of a shard: the id of its first column, and columns of the whole vocabulary.
    first_column: int
    vocab: int

    @property
    def plain(self) -> bool:
        """Whether the library does all that is done to the logits, by its temperature."""
        return self.softcap is None and self.row_temperature is None

    def columns(self, first: int, end: int) -> Tensor:
        return self.weight[first:end].to(self.dtype)

    def logits(self, hidden: Tensor, first: int, end: int, buffer: Tensor) -> Tensor:
        """Those of some columns, as the product has them: in the buffer where it can be there."""
        tile = buffer[: len(hidden) * (end - first)].view(len(hidden), end - first)
        weight = self.columns(first, end).t()
        if buffer.dtype == hidden.dtype:
            torch.mm(hidden, weight, out=tile)
        else:
            torch.mm(hidden, weight, out_dtype=buffer.dtype, out=tile)
        if self.bias is not None:
            tile += self.bias[first:end]
        return tile

    def transformed(self, logits: Tensor, rows: slice) -> Tensor:
        """What is compared, if that is not the library's to make: in float32."""
        z = logits.float() * self.logit_scale
        if self.softcap is not None:
            z = (z / self.softcap).tanh_().mul_(self.softcap)
        return z if self.row_temperature is None else z.div_(self.row_temperature[rows, None])

    def transform_gradient(self, grad: Tensor, z: Tensor, rows: slice) -> Tensor:
        """That of the product, from that of what was compared."""
        if self.row_temperature is not None:
            temperature = self.row_temperature[rows, None]
            grad, z = grad / temperature, z * temperature
        if self.softcap is not None:
            grad = grad * (1 - (z / self.softcap) ** 2)
        return grad * self.logit_scale


class Work(NamedTuple):
    """The rows that take part, and what they are worked on with."""

    head: Head
    hidden: Tensor  # [rows, H]
    index: Tensor  # [rows]
    kept: Tensor | None  # which of all rows they are; all if None
    options: tuple  # of the library

    @staticmethod
    def of(tensors: tuple, options: tuple, shard: tuple[int, int] | None = None) -> Work:
        """``shard`` is of a weight that has some columns: the id of the first, and how many columns
        there are in all."""
        hidden, weight, index, bias, row_temperature = tensors
        temperature, ignore_index, logit_scale, softcap = options
        for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
            if value is not None and not 0 < value < inf:
                what = f"{_lists.LINEAR.name}: option `{name}`"
                raise ValueError(f"{what} is {value}, expected a finite number above 0")
        if row_temperature is not None and row_temperature.is_cpu:
            legal = (row_temperature > 0) & row_temperature.isfinite()
            if not legal.all():
                refuse(_lists.LINEAR.name, "temperature", "has others", "finite numbers above 0")
        hidden = hidden.reshape(-1, hidden.shape[-1])
        index = index.reshape(-1)
        temperatures = None if row_temperature is None else row_temperature.reshape(-1)
        kept = None
        if ignore_index is not None:
            kept = (index != ignore_index).nonzero().squeeze(-1)
            if len(kept) == len(index):
                kept = None
            else:
                hidden, index = hidden[kept], index[kept]
                temperatures = None if temperatures is None else temperatures[kept]
        columns = (0, len(weight)) if shard is None else shard
        head = Head(weight, bias, logit_scale, softcap, temperatures, hidden.dtype, *columns)
        if head.plain:
            temperature = temperature / logit_scale
        elif temperature != 1.0:
            scale = torch.tensor(temperature, dtype=torch.float32, device=hidden.device)
            temperatures = (
                scale.expand(len(index)) if temperatures is None else temperatures * scale
            )
            head, temperature = head._replace(row_temperature=temperatures), 1.0
        return Work(head, hidden.contiguous(), index.contiguous(), kept, (temperature, None))

    def chunks(self) -> Iterator[slice]:
        for first in range(0, len(self.hidden), ROWS):
            yield slice(first, min(first + ROWS, len(self.hidden)))

    def tiles(self, rows: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """A buffer for a tile of so many rows, and the ranges of columns."""
        hidden, vocab = self.hidden, len(self.head.weight)
        dtype = torch.float32 if hidden.is_cuda else hidden.dtype
        most = TILE_BYTES[hidden.device.type] // (rows * dtype.itemsize)
        width = min(max(most // 64 * 64, _LEAST_COLUMNS), vocab)
        buffer = torch.empty(rows * width, dtype=dtype, device=hidden.device)
        return buffer, [(v, min(v + width, vocab)) for v in range(0, vocab, width)]

    def spread(self, rows: Tensor, like: Tensor) -> Tensor:
        """Values of the rows that take part, with 0 for all others, in the shape of the rows."""
        if self.kept is None:
            return rows.reshape(like.shape)
        found = torch.zeros(like.numel(), dtype=rows.dtype, device=rows.device)
        found[self.kept] = rows
        return found.reshape(like.shape)

    def gather(self, values: Tensor | None) -> Tensor | None:
        """Of one value for each row those of the rows that take part."""
        if values is None:
            return None
        values = values.reshape(-1)
        return values.contiguous() if self.kept is None else values[self.kept]


def check(op: str, tensors: tuple, options: tuple, some_columns: bool = False) -> None:
    """With ``some_columns`` the weight is a shard, which may have none."""
    hidden, weight, index, bias, row_temperature = tensors
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _LOGITS:
            _refuse_dtype(op, name, tensor, "float32, float16 or bfloat16")
    if hidden.dim() == 0:
        _lists.check_rows(op, "hidden", hidden.shape, "hidden_size")
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[-1]
    if not fits or not (len(weight) or some_columns):
        refuse(op, "weight", f"has shape {list(weight.shape)}", f"[vocab, {hidden.shape[-1]}]")
    if index.dtype not in _TARGETS:
        _refuse_dtype(op, "index", index, "int64 or int32")
    _lists.check_shape(op, "index", index.shape, hidden.shape[:-1])
    if bias is not None:
        _lists.check_shape(op, "bias", bias.shape, weight.shape[:1])
    if row_temperature is not None:
        if row_temperature.dtype != torch.float32:
            _refuse_dtype(op, "temperature", row_temperature, torch.float32)
        _lists.check_shape(op, "temperature", row_temperature.shape, hidden.shape[:-1])
    for name, tensor in zip(("weight", "index", "bias", "temperature"), tensors[1:]):
        if tensor is not None:
            check_device(op, name, tensor, hidden.device)


def _backward(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
) -> tuple:
    saved = ctx.saved_tensors
    tensors, entropy, stats = saved[:5], saved[5], saved[6]
    want_entropy, *options = ctx.options[0], *ctx.options[len(_lists.LINEAR_OUTPUTS) :]
    # After the dispatch keys, which stand first.
    hidden, weight, _, bias = ctx.needs_input_grad[1:5]
    if not want_entropy:
        entropy = grad_entropy = None
    upstream = (stats, entropy, grad_logp, grad_entropy)
    grads = call(linear_logprob_backward, *tensors, *upstream, hidden, weight, bias, *options)
    grads = [grad if wanted else None for grad, wanted in zip(grads, (hidden, weight, bias))]
    return grads[0], grads[1], None, grads[2]


_RESULTS = "logp entropy stats log_sum_sq_probs mean_logits is_top1"


@_op(_lists.LINEAR, _RESULTS, _backward, " ".join(_lists.LINEAR_OUTPUTS), differentiable=2)
def linear_logprob(tensors: tuple, options: tuple) -> Results:
    wants, options = options[: len(_lists.LINEAR_OUTPUTS)], options[len(_lists.LINEAR_OUTPUTS) :]
    hidden, _, index, *_ = tensors
    check(_lists.LINEAR.name, tensors, options)

    def result(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(index.shape if wanted else 0, dtype=dtype, device=hidden.device)

    logp, stats = result(True), torch.stack([result(True)] * 2)
    entropy, log_sum_sq_probs, mean_logits = map(result, wants[:3])
    is_top1 = result(wants[3], torch.bool)
    yield logp, entropy, stats, log_sum_sq_probs, mean_logits, is_top1
    outputs = (logp, *stats, entropy, log_sum_sq_probs, mean_logits, is_top1)
    with torch.autocast(hidden.device.type, enabled=False):
        work = Work.of(tensors, options)
        found = [torch.empty(len(work.index), dtype=x.dtype, device=x.device) for x in outputs]
        for rows in work.chunks():
            chunk = Chunk(work, rows, wants)
            for output, values in zip(found, chunk.values()):
                if values is not None:
                    output[rows] = values
        for output, values, wanted in zip(outputs, found, (True, True, True, *wants)):
            if wanted:
                output.copy_(work.spread(values, output))


class Chunk:
    """The forward pass of some rows."""

    def __init__(self, work: Work, rows: slice, wants: tuple[bool, ...]) -> None:
        self.work, self.rows = work, rows
        self.hidden, self.index = work.hidden[rows], work.index[rows]
        self.entropy, self.squares, self.mean, self.top1 = wants
        like = {"dtype": torch.float32, "device": self.hidden.device}
        count = len(self.index)
        self.sums = torch.empty(4, count, **like)
        self.square_sums = torch.empty(3, count, **like)
        self.total = torch.zeros(count, **like)
        self.best = torch.full((count,), -inf, **like)
        self.best_column = torch.full_like(self.index, -1, dtype=torch.int64)

    def values(self) -> tuple[Tensor | None, ...]:
        """In the order of the outputs."""
        self.fold()
        return self.finish()

    def fold(self) -> None:
        """Makes the running sums over all columns of the head."""
        head = self.work.head
        buffer, tiles = self.work.tiles(len(self.index))
        for first, end in tiles:
            logits = head.logits(self.hidden, first, end, buffer)
            if not head.plain:
                logits = head.transformed(logits, self.rows)
            self._fold(logits, first)

    def finish(self) -> tuple[Tensor | None, ...]:
        """What the running sums come to."""
        work, vocab = self.work, self.work.head.vocab
        logp, log_sum, entropy = torch.empty_like(self.sums[:3])
        sums = self._addresses(self.sums, self.entropy)
        results = _addresses((), (logp, log_sum, entropy if self.entropy else None))
        sizes = (len(logp), vocab, _TARGETS[self.index.dtype])
        given = (*_addresses((self.index,)), *sums, *results)
        _call(_lists.logprob_finish, logp, work.options, *sizes, *given)
        temperature = work.options[0]
        return (
            logp,
            self.sums[0],
            log_sum,
            entropy if self.entropy else None,
            self.square_sums[1].log1p() - 2 * log_sum if self.squares else None,
            self.total / (vocab * temperature) if self.mean else None,
            self.best_column == self.index if self.top1 else None,
        )

    def _fold(self, logits: Tensor, first: int) -> None:
        options = self.work.options
        self._partial(logits, first, options, self._addresses(self.sums, self.entropy))
        if self.squares:
            # Squares of probabilities are those at half the temperature, but for a factor.
            halved = (options[0] / 2, options[1])
            self._partial(logits, first, halved, self._addresses(self.square_sums, False))
        if self.mean:
            self.total += logits.sum(-1, dtype=torch.float32)
        if self.top1:
            best, column = logits.max(-1)
            higher = best > self.best
            self.best = torch.where(higher, best.float(), self.best)
            self.best_column = torch.where(higher, column + first, self.best_column)

    def _partial(self, logits: Tensor, first: int, options: tuple, sums: list[int]) -> None:
        count, columns = logits.shape
        types = (_LOGITS[logits.dtype], _TARGETS[self.index.dtype])
        head = self.work.head
        sizes = (count, columns, head.first_column + first, head.vocab, *types, int(first == 0))
        given = (*_addresses((logits, self.index)), *sums)
        _call(_lists.logprob_partial, logits, options, *sizes, *given)

    @staticmethod
    def _addresses(sums: Tensor, weighted: bool) -> list[int]:
        largest, rest, logit, *more = sums
        return _addresses((), (largest, rest, logit, more[0] if weighted else None))


@_op(_lists.LINEAR_BACKWARD, "grad_hidden grad_weight grad_bias", None, "hidden weight bias")
def linear_logprob_backward(tensors: tuple, options: tuple) -> Results:
    *wants, temperature, ignore_index, logit_scale, softcap = options
    tensors, upstream = tensors[:5], tensors[5:]
    hidden, weight, index, bias, _ = tensors
    options = (temperature, ignore_index, logit_scale, softcap)
    check(_lists.LINEAR.name, tensors, options)
    rows = (*index.shape, 0)
    stats, *given = _checked(_lists.LINEAR_BACKWARD_ROWS, upstream, index, rows)
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if want and tensor is not None
        else torch.empty(0, dtype=hidden.dtype, device=hidden.device)
        for tensor, want in zip((hidden, weight, bias), wants)
    ]
    yield tuple(grads)
    with torch.autocast(hidden.device.type, enabled=False):
        work = Work.of(tensors, options)
        known = [work.gather(values) for values in (*stats, *given)]
        Gradients(work, wants, grads).write(known)


class Gradients:
    """Those of hidden, weight and bias, as far as they are wanted. Sums over tiles are float32."""

    def __init__(self, work: Work, wants: list[bool], grads: list[Tensor]) -> None:
        self.work = work
        self.want_hidden, self.want_weight, self.want_bias = wants
        self.grad_hidden, self.grad_weight, self.grad_bias = grads
        # One product a tile, which is rounded once, where all rows go through together.
        self.at_once = len(work.hidden) <= ROWS
        self.weight_sums, self.bias_sums = self.grad_weight, self.grad_bias
        if not self.at_once:
            self.weight_sums = torch.zeros_like(self.grad_weight, dtype=torch.float32)
            self.bias_sums = torch.zeros_like(self.grad_bias, dtype=torch.float32)

    def write(self, known: list[Tensor | None]) -> None:
        work = self.work
        f32 = torch.float32
        hidden_sums = torch.zeros_like(work.hidden, dtype=f32) if self.want_hidden else None
        if not len(work.hidden):
            self.grad_weight.zero_()
            self.grad_bias.zero_()
        for rows in work.chunks():
            sums = hidden_sums[rows] if self.want_hidden else None
            self._chunk(rows, [None if x is None else x[rows] for x in known], sums)
        if not self.at_once:
            self.grad_weight.copy_(self.weight_sums)
            self.grad_bias.copy_(self.bias_sums)
        if self.want_hidden:
            grad = self.grad_hidden.view(-1, self.grad_hidden.shape[-1])
            if work.kept is None:
                grad.copy_(hidden_sums)
            else:
                grad.zero_()[work.kept] = hidden_sums.to(grad.dtype)

    def _chunk(self, rows: slice, known: list[Tensor | None], hidden_sums: Tensor | None) -> None:
        work, head = self.work, self.work.head
        hidden, index = work.hidden[rows], work.index[rows]
        buffer, tiles = work.tiles(len(index))
        for first, end in tiles:
            logits = head.logits(hidden, first, end, buffer)
            z = logits if head.plain else head.transformed(logits, rows)
            grad = z if head.plain else z.clone()
            sizes = (len(index), end - first, head.first_column + first, head.vocab)
            types = (_LOGITS[z.dtype], _TARGETS[index.dtype])
            given = _addresses((grad, index, *known), (grad,))
            _call(_lists.logprob_tile_backward, grad, work.options, *sizes, *types, *given)
            if not head.plain:
                grad = head.transform_gradient(grad, z, rows)
            self._products(grad.to(hidden.dtype), hidden, first, end, hidden_sums)
            if self.want_bias and head.bias is not None:
                self._add(self.bias_sums, first, end, grad.sum(0, dtype=torch.float32))

    def _products(
        self, grad: Tensor, hidden: Tensor, first: int, end: int, hidden_sums: Tensor | None
    ) -> None:
        if hidden_sums is not None:
            weight = self.work.head.columns(first, end)
            if hidden.dtype == torch.float32:
                torch.addmm(hidden_sums, grad, weight, out=hidden_sums)
            else:
                hidden_sums += _product(grad, weight)
        if self.want_weight:
            into = self.grad_weight[first:end]
            if self.at_once and into.dtype == hidden.dtype:
                torch.mm(grad.t(), hidden, out=into)
            else:
                self._add(self.weight_sums, first, end, _product(grad.t(), hidden))

    def _add(self, sums: Tensor, first: int, end: int, more: Tensor) -> None:
        if self.at_once:
            sums[first:end] = more
        else:
            sums[first:end] += more


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32 where torch can."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
