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

The loss itself from hidden states, where it asks for nothing of a whole row of tokens, has all
columns of some rows in a tile, and one product less, since the logits are not made again:

    a tile               hidden [n, H] @ weight.T               logits [n, V]
                         reduced to                             logp, entropy [n]
                         the loss of these tokens               their gradients [n]
                         gradient in their place                [n, V]
                         gradient @ weight                      grad_hidden [n, H]
                         gradient.T @ hidden                    added to grad_weight [V, H], float32

Products are torch's, in the dtype of the hidden states. Their result is float32 on CUDA, from torch
2.8 on; on the CPU, where torch has no such product, it has the dtype of the hidden states, and so
is rounded once. Rows that are ignored take no part in any product.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _lib, _lists
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
    check_ids,
)

# Rows of hidden states that go through the head together: the weight is read once for them.
ROWS = 8192
# A tile of logits, of which there is one at a time: on a CPU it is to stay in the caches.
TILE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
_LEAST_COLUMNS = 1024
# A tile of the loss, which the weight and the sums of its gradient are read for.
LOSS_TILE_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
# Whether torch has products of 16-bit matrices whose result is float32, on CUDA.
_WIDE = "dtype_out" in torch.ops.aten.mm.overloads()


def autocast(hidden: Tensor) -> Tensor:
    """Hidden states in the dtype of products: that of autocast, if there is one."""
    kind = hidden.device.type
    known = kind in TILE_BYTES and hidden.dtype in _LOGITS
    if known and torch.is_autocast_enabled(kind):
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden


class Adapter(NamedTuple):
    """What low-rank adaptation adds to a weight: ``scale * b @ a``."""

    a: Tensor  # [rank, H]
    b: Tensor  # [vocab, rank]
    scale: float


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
    lora: Adapter | None = None

    @property
    def plain(self) -> bool:
        """Whether the library does all that is done to the logits, by its temperature."""
        return self.softcap is None and self.row_temperature is None

    def columns(self, first: int, end: int) -> Tensor:
        return self.weight[first:end].to(self.dtype)

    def lowered(self, hidden: Tensor) -> Tensor | None:
        """The hidden states in the rank of the adapter."""
        return None if self.lora is None else torch.mm(hidden, self.lora.a.to(self.dtype).t())

    def adapter_columns(self, first: int, end: int) -> Tensor:
        """Rows of the adapter's ``b``, times its scale."""
        return self.lora.b[first:end].to(self.dtype) * self.lora.scale

    def logits(
        self, hidden: Tensor, lowered: Tensor | None, first: int, end: int, buffer: Tensor
    ) -> Tensor:
        """Those of some columns, as the product has them, in the buffer."""
        tile = buffer[: len(hidden) * (end - first)].view(len(hidden), end - first)
        weight = self.columns(first, end).t()
        if buffer.dtype == hidden.dtype:
            torch.mm(hidden, weight, out=tile)
        else:
            torch.mm(hidden, weight, out_dtype=buffer.dtype, out=tile)
        if lowered is not None:
            tile += _product(lowered, self.adapter_columns(first, end).t())
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
        hidden, weight, index, bias, row_temperature, lora_a, lora_b = tensors
        temperature, ignore_index, logit_scale, softcap, lora_scale = options
        op, columns = _lists.LINEAR.name, (0, len(weight)) if shard is None else shard
        numbers = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        for name, value in numbers.items():
            if value is not None:
                _lists.check_positive(op, name, value)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        index = index.reshape(-1)
        temperatures = None if row_temperature is None else row_temperature.reshape(-1)
        if index.is_cpu:
            check_targets(op, index, columns[1], ignore_index)
        kept = None
        if ignore_index is not None:
            kept = (index != ignore_index).nonzero().squeeze(-1)
            if len(kept) == len(index):
                kept = None
            else:
                hidden, index = hidden[kept], index[kept]
                temperatures = None if temperatures is None else temperatures[kept]
        if temperatures is not None and temperatures.is_cpu:
            legal = (temperatures > 0) & temperatures.isfinite()
            if not legal.all():
                refuse(op, "temperature", "has others", "finite numbers above 0")
        lora = None if lora_a is None else Adapter(lora_a, lora_b, lora_scale)
        head = Head(weight, bias, logit_scale, softcap, temperatures, hidden.dtype, *columns, lora)
        if head.plain:
            temperature = temperature / logit_scale
        elif temperature != 1.0:
            scale = torch.tensor(temperature, dtype=torch.float32, device=hidden.device)
            temperatures = (
                scale.expand(len(index)) if temperatures is None else temperatures * scale
            )
            head, temperature = head._replace(row_temperature=temperatures), 1.0
        return Work(head, hidden.contiguous(), index.contiguous(), kept, (temperature, None))

    def chunks(self, rows: int = ROWS) -> Iterator[slice]:
        for first in range(0, len(self.hidden), rows):
            yield slice(first, min(first + rows, len(self.hidden)))

    @property
    def tile_dtype(self) -> torch.dtype:
        return torch.float32 if self.hidden.is_cuda and _WIDE else self.hidden.dtype

    def tiles(self, rows: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """A buffer for a tile of so many rows, and the ranges of columns."""
        hidden, vocab, dtype = self.hidden, len(self.head.weight), self.tile_dtype
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


def check_targets(op: str, index: Tensor, vocab: int, ignore_index: int | None) -> None:
    """As the library does for the rows that it is given, of which some may be missing."""
    outside = (index < 0) | (index >= vocab)
    if ignore_index is not None:
        outside &= index != ignore_index
    if outside.any():
        row = int(outside.nonzero()[0])
        found = f"`index`[{row}] is {int(index[row])}"
        raise ValueError(f"{op}: {found}, expected 0..{vocab}")


def check(tensors: tuple, some_columns: bool = False) -> None:
    """With ``some_columns`` the weight is a shard, which may have none."""
    op = _lists.LINEAR.name
    hidden, weight, index, bias, row_temperature, lora_a, lora_b = tensors
    numbers = {"hidden": hidden, "weight": weight, "bias": bias}
    numbers |= {"lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in numbers.items():
        if tensor is not None and tensor.dtype not in _LOGITS:
            _refuse_dtype(op, name, tensor, "float32, float16 or bfloat16")
    _lists.check_head(hidden.shape, weight.shape, some_columns)
    check_ids(op, index)
    _lists.check_shape(op, "index", index.shape, hidden.shape[:-1])
    if bias is not None:
        _lists.check_shape(op, "bias", bias.shape, weight.shape[:1])
    if row_temperature is not None:
        if row_temperature.dtype != torch.float32:
            _refuse_dtype(op, "temperature", row_temperature, torch.float32)
        _lists.check_shape(op, "temperature", row_temperature.shape, hidden.shape[:-1])
    if lora_a is not None:
        rank = lora_a.shape[0] if lora_a.dim() else 0
        _lists.check_shape(op, "lora_a", lora_a.shape, (rank, hidden.shape[-1]))
        _lists.check_shape(op, "lora_b", lora_b.shape, (len(weight), rank))
    for name, tensor in {**numbers, "index": index, "temperature": row_temperature}.items():
        if tensor is not None:
            check_device(op, name, tensor, hidden.device)


def _backward(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
) -> tuple:
    saved = ctx.saved_tensors
    tensors, entropy, stats = saved[:_INPUTS], saved[_INPUTS], saved[_INPUTS + 1]
    want_entropy, *options = ctx.options[0], *ctx.options[len(_lists.LINEAR_OUTPUTS) :]
    # After the dispatch keys, which stand first.
    wants = [ctx.needs_input_grad[1 + place] for place in _DIFFERENTIABLE]
    if not want_entropy:
        entropy = grad_entropy = None
    upstream = (stats, entropy, grad_logp, grad_entropy)
    found = call(linear_logprob_backward, *tensors, *upstream, *wants, *options)
    grads: list[Tensor | None] = [None] * _INPUTS
    for place, grad, wanted in zip(_DIFFERENTIABLE, found, wants):
        grads[place] = grad if wanted else None
    return tuple(grads)


_INPUTS = len(_lists.LINEAR.inputs)
# Which of them have a gradient, by their places.
_NAMES = [argument.name for argument in _lists.LINEAR.inputs]
_GRADIENTS = ("hidden", "weight", "bias", "lora_a", "lora_b")
_DIFFERENTIABLE = [_NAMES.index(name) for name in _GRADIENTS]
_RESULTS = "logp entropy stats log_sum_sq_probs mean_logits is_top1"
_WANTS = " ".join(_lists.LINEAR_OUTPUTS)


@_op(_lists.LINEAR, _RESULTS, _backward, _WANTS, differentiable=2, saved=2)
def linear_logprob(tensors: tuple, options: tuple) -> Results:
    wants, options = options[: len(_lists.LINEAR_OUTPUTS)], options[len(_lists.LINEAR_OUTPUTS) :]
    hidden, _, index, *_ = tensors
    check(tensors)

    def result(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(index.shape if wanted else 0, dtype=dtype, device=hidden.device)

    logp, stats = result(True), torch.empty(2, *index.shape, device=hidden.device)
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
        lowered = head.lowered(self.hidden)
        for first, end in tiles:
            logits = head.logits(self.hidden, lowered, first, end, buffer)
            if not head.plain:
                logits = head.transformed(logits, self.rows)
            self._fold(logits, first)

    def finish(self) -> tuple[Tensor | None, ...]:
        """What the running sums come to."""
        work, vocab = self.work, self.work.head.vocab
        logp, log_sum, entropy = finish(self.index, self.running(), vocab, work.options)
        temperature = work.options[0]
        return (
            logp,
            self.sums[0],
            log_sum,
            entropy,
            self.square_sums[1].log1p() - 2 * log_sum if self.squares else None,
            self.total / (vocab * temperature) if self.mean else None,
            (self.best_column == self.index) & ~logp.isnan() if self.top1 else None,
        )

    def running(self) -> tuple[Tensor | None, ...]:
        """The sums, the weighted one if the entropy is wanted."""
        largest, rest, logit, weighted = self.sums
        return largest, rest, logit, weighted if self.entropy else None

    def _fold(self, logits: Tensor, first: int) -> None:
        head, options = self.work.head, self.work.options
        columns = (head.first_column + first, head.vocab)
        fold(logits, self.index, self.running(), columns, first == 0, options)
        if self.squares:
            # Squares of probabilities are those at half the temperature, but for a factor.
            halved = (options[0] / 2, options[1])
            fold(logits, self.index, (*self.square_sums, None), columns, first == 0, halved)
        if self.mean:
            self.total += logits.sum(-1, dtype=torch.float32)
        if self.top1:
            best, column = logits.max(-1)
            higher = best > self.best
            self.best = torch.where(higher, best.float(), self.best)
            self.best_column = torch.where(higher, column + first, self.best_column)


def fold(
    logits: Tensor,
    index: Tensor,
    sums: tuple[Tensor | None, ...],
    columns: tuple[int, int],
    begins: bool,
    options: tuple,
) -> None:
    """Folds logits ``[rows, columns]`` into the running sums of their rows: the largest, the sum,
    the target's logit, and the weighted sum or None. ``columns`` are the id of the first one and
    how many there are in all."""
    types = (_LOGITS[logits.dtype], _TARGETS[index.dtype])
    sizes = (*logits.shape, *columns, *types, int(begins))
    _call(_lists.logprob_partial, logits, options, *sizes, *_addresses((logits, index, *sums)))


def finish(
    index: Tensor, sums: tuple[Tensor | None, ...], vocab: int, options: tuple
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities, logarithms of sums, and entropies where there is a weighted sum."""
    logp, log_sum = torch.empty_like(sums[0]), torch.empty_like(sums[0])
    entropy = None if sums[3] is None else torch.empty_like(logp)
    sizes = (len(logp), vocab, _TARGETS[index.dtype])
    addresses = _addresses((index, *sums, logp, log_sum, entropy))
    _call(_lists.logprob_finish, logp, options, *sizes, *addresses)
    return logp, log_sum, entropy


_GRADIENT_RESULTS = " ".join(f"grad_{name}" for name in _GRADIENTS)


@_op(_lists.LINEAR_BACKWARD, _GRADIENT_RESULTS, None, " ".join(_GRADIENTS))
def linear_logprob_backward(tensors: tuple, options: tuple) -> Results:
    wants, options = options[: len(_GRADIENTS)], options[len(_GRADIENTS) :]
    tensors, upstream = tensors[:_INPUTS], tensors[_INPUTS:]
    hidden, index = tensors[0], tensors[2]
    check(tensors)
    rows = (*index.shape, 0)
    stats, *given = _checked(_lists.LINEAR_BACKWARD_ROWS, upstream, index, rows)
    places = zip(_DIFFERENTIABLE, wants)
    grads = [gradient_of(tensors[place], wanted, hidden) for place, wanted in places]
    yield tuple(grads)
    with torch.autocast(hidden.device.type, enabled=False):
        work = Work.of(tensors, options)
        known = [work.gather(values) for values in (*stats, *given)]
        Gradients(work, *grads).write(known)


def gradient_of(tensor: Tensor | None, wanted: bool, like: Tensor) -> Tensor:
    """A buffer for the gradient of an argument, of no elements if there is none."""
    if tensor is None or not wanted:
        return torch.empty(0, dtype=like.dtype, device=like.device)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class Gradients:
    """Those of hidden, weight, bias and adapter, of which those of no elements are not wanted. Sums
    over tiles are float32."""

    def __init__(self, work: Work, *grads: Tensor, chunk: int = ROWS) -> None:
        self.work, self.grads = work, grads
        self.hidden, self.weight, self.bias, self.a, self.b = (bool(x.numel()) for x in grads)
        _, weight, bias, a, b = grads
        f32 = torch.float32
        # One product a tile, which is rounded once, where all rows go through together.
        self.at_once = len(work.hidden) <= chunk
        self.by_columns = [weight, bias, b]
        if not self.at_once:
            self.by_columns = [torch.zeros_like(x, dtype=f32) for x in self.by_columns]
        self.hidden_sums = torch.zeros_like(work.hidden, dtype=f32) if self.hidden else None
        self.a_sums = torch.zeros_like(a, dtype=f32)

    def write(self, known: list[Tensor | None]) -> None:
        for rows in self.work.chunks():
            self._chunk(rows, [None if x is None else x[rows] for x in known])
        self.finish()

    def finish(self) -> None:
        """Writes what the chunks have added up."""
        work, hidden_sums = self.work, self.hidden_sums
        hidden, weight, bias, a, b = self.grads
        if not len(work.hidden):
            for grad in (weight, bias, b):
                grad.zero_()
        a.copy_(self.a_sums)
        if not self.at_once:
            for grad, sums in zip((weight, bias, b), self.by_columns):
                grad.copy_(sums)
        if self.hidden:
            grad = hidden.view(-1, hidden.shape[-1])
            if work.kept is None:
                grad.copy_(hidden_sums)
            else:
                grad.zero_()[work.kept] = hidden_sums.to(grad.dtype)

    def _chunk(self, rows: slice, known: list[Tensor | None]) -> None:
        work, head = self.work, self.work.head
        hidden = work.hidden[rows]
        lowered = head.lowered(hidden)
        lowered_sums = self.lowered_sums(lowered)
        buffer, tiles = work.tiles(len(hidden))
        for first, end in tiles:
            logits = head.logits(hidden, lowered, first, end, buffer)
            z = logits if head.plain else head.transformed(logits, rows)
            self.add(rows, (first, end), z, lowered, lowered_sums, known)
        self.add_adapter(rows, lowered_sums)

    def lowered_sums(self, lowered: Tensor | None) -> Tensor | None:
        """For what comes through the adapter, in its rank, if that is wanted."""
        if lowered is None or not (self.hidden or self.a):
            return None
        return torch.zeros_like(lowered, dtype=torch.float32)

    def add(
        self,
        rows: slice,
        columns: tuple[int, int],
        z: Tensor,
        lowered: Tensor | None,
        lowered_sums: Tensor | None,
        known: list[Tensor | None],
    ) -> None:
        """What comes of a tile of compared logits, which are overwritten."""
        work, head = self.work, self.work.head
        hidden, index, (first, end) = work.hidden[rows], work.index[rows], columns
        grad = z if head.plain else z.clone()
        sizes = (len(index), end - first, head.first_column + first, head.vocab)
        types = (_LOGITS[z.dtype], _TARGETS[index.dtype])
        given = _addresses((grad, index, *known), (grad,))
        _call(_lists.logprob_tile_backward, grad, work.options, *sizes, *types, *given)
        if not head.plain:
            grad = head.transform_gradient(grad, z, rows)
        weight_sums, bias_sums, b_sums = self.by_columns
        if self.bias:
            self._add(bias_sums, first, end, grad.sum(0, dtype=torch.float32))
        grad = grad.to(hidden.dtype)
        if self.hidden:
            _accumulate(self.hidden_sums[rows], grad, head.columns(first, end))
        if self.weight:
            self._add_product(weight_sums, first, end, grad, hidden)
        if lowered_sums is not None:
            _accumulate(lowered_sums, grad, head.adapter_columns(first, end))
        if self.b:
            self._add(b_sums, first, end, _product(grad.t(), lowered) * head.lora.scale)

    def add_adapter(self, rows: slice, lowered_sums: Tensor | None) -> None:
        """What has come through the adapter, once all columns have."""
        if lowered_sums is None:
            return
        work, lora = self.work, self.work.head.lora
        hidden = work.hidden[rows]
        lowered_grad = lowered_sums.to(hidden.dtype)
        if self.hidden:
            _accumulate(self.hidden_sums[rows], lowered_grad, lora.a.to(hidden.dtype))
        if self.a:
            self.a_sums += _product(lowered_grad.t(), hidden)

    def _add_product(
        self, sums: Tensor, first: int, end: int, grad: Tensor, hidden: Tensor
    ) -> None:
        if self.at_once and sums.dtype == hidden.dtype:
            torch.mm(grad.t(), hidden, out=sums[first:end])
        elif not self.at_once:
            _accumulate(sums[first:end], grad.t(), hidden)
        else:
            self._add(sums, first, end, _product(grad.t(), hidden))

    def _add(self, sums: Tensor, first: int, end: int, more: Tensor) -> None:
        if self.at_once:
            sums[first:end] = more
        else:
            sums[first:end] += more


def _accumulate(sums: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.float32:
        torch.addmm(sums, a, b, out=sums)
    else:
        sums += _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32 where torch can."""
    if a.is_cuda and _WIDE and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


# --- the loss ---


def _backward_of_loss(ctx: Any, grad: Tensor, *_: None) -> list[Tensor | None]:
    stored = ctx.saved_tensors[len(_DIFFERENTIABLE) :]
    # As for the loss of log-probabilities, which looks too.
    as_stored = type(grad) is Tensor and grad.is_cpu and grad.item() == 1.0
    as_stored = as_stored and not torch._C._autograd._get_current_graph_task_keep_graph()
    grads: list[Tensor | None] = [None] * len(_lists.LINEAR_PPO_LOSS.inputs)
    for place, gradient in zip(_DIFFERENTIABLE, stored):
        if ctx.needs_input_grad[1 + place]:
            grads[place] = gradient if as_stored else _scaled(gradient, grad)
    return grads


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """In float32, rounded once; a 0 stays 0 whatever comes from upstream."""
    product = gradient.float() * upstream
    return torch.where(gradient == 0, 0.0, product).to(gradient.dtype)


_STATS = len(_lib.STATS)
_LOSS_RESULTS = f"loss {_GRADIENT_RESULTS} stats logp entropy"
_LINEAR_OPTIONS = len(_lists.LINEAR.options.kinds)
_OPTIONS = list(_lists.PPO_LOSS.options.kinds)
_OF_LOSS = [argument.name for argument in _lists.LINEAR_PPO_LOSS_ROWS.inputs]


@_op(
    _lists.LINEAR_PPO_LOSS,
    _LOSS_RESULTS,
    _backward_of_loss,
    " ".join(_GRADIENTS),
    kept=_DIFFERENTIABLE,
    saved=len(_GRADIENTS),
)
def linear_ppo_loss(tensors: tuple, options: tuple) -> Results:
    wants, options = options[: len(_GRADIENTS)], options[len(_GRADIENTS) :]
    head_tensors, of_tokens = tensors[:_INPUTS], tensors[_INPUTS:]
    options, loss_options = options[:_LINEAR_OPTIONS], options[_LINEAR_OPTIONS:]
    hidden, index = tensors[0], tensors[2]
    check(head_tensors)
    offsets = of_tokens[_OF_LOSS.index("offsets")]
    of_pack = None if offsets is None else offsets.shape
    rows = _lists.rows_of(_lists.LINEAR_PPO_LOSS, index.shape, of_pack, "index")
    given = _checked(_lists.LINEAR_PPO_LOSS_ROWS, of_tokens, index, index.shape, rows)
    f32 = {"dtype": torch.float32, "device": hidden.device}
    loss, stats = torch.empty((), **f32), torch.empty(_STATS, **f32)
    logp, entropy = torch.zeros(index.shape, **f32), torch.zeros(index.shape, **f32)
    places = zip(_DIFFERENTIABLE, wants)
    grads = [gradient_of(tensors[place], wanted, hidden) for place, wanted in places]
    yield loss, *grads, stats, logp, entropy
    given = dict(zip(_OF_LOSS, given))
    with torch.autocast(hidden.device.type, enabled=False):
        work = Work.of(head_tensors, options)
        row_bytes = len(work.head.weight) * work.tile_dtype.itemsize
        count = max(LOSS_TILE_BYTES[hidden.device.type] // row_bytes, 1)
        sizes = (torch.Size(rows).numel(), index.shape[-1])
        of_rows = Loss(work, given, loss_options, index.shape, sizes, count)
        gradients = Gradients(work, *grads, chunk=count)
        found = torch.empty(2, len(work.index), **f32)
        for rows in work.chunks(count):
            of_rows.chunk(rows, gradients, found)
        gradients.finish()
        for output, values in zip((logp, entropy), found):
            output.copy_(work.spread(values, output))
    exact = torch.empty_like(stats, dtype=torch.float64)
    inputs = {**given, "logp": logp, "entropy": entropy}
    of_pass = [inputs.get(argument.name) for argument in _lists.PPO_LOSS.inputs]
    addresses = _addresses(of_pass, (exact, loss, None, None, None))
    _call(_lists.ppo_loss, exact, loss_options, *sizes, *addresses)
    stats.copy_(exact)


class Loss:
    """The loss of the rows that take part, as far as it is one of tokens."""

    def __init__(
        self,
        work: Work,
        given: dict[str, Tensor | None],
        options: tuple,
        shape: torch.Size,
        sizes: tuple[int, int],
        rows: int,
    ) -> None:
        """Of tokens of that shape and rows and tokens as the library counts them; ``rows`` of the
        hidden states go through the head together."""
        self.work = work
        size = min(rows, len(work.hidden)) * len(work.head.weight)
        self.buffer = torch.empty(size, dtype=work.tile_dtype, device=work.hidden.device)
        of_batch = ("mask", "offsets")
        self.of_tokens = {name: work.gather(x) for name, x in given.items() if name not in of_batch}
        settings = dict(zip(_OPTIONS, options))
        ones = torch.ones(shape, dtype=torch.float32, device=work.hidden.device)
        numbers = {"logp": ones, "old_logp": ones, "advantages": -ones}
        numbers |= {name: given[name] for name in of_batch}

        def factors(**aggregation: Any) -> Tensor:
            """What the loss multiplies a token by: its gradient where the term is logp itself."""
            of_logp = _lists.PPO_LOSS.options.defaults() | {"surrogate": "reinforce"}
            found = torch.empty_like(ones)
            self._pass(of_logp | aggregation, numbers, sizes, found)
            return work.gather(found)

        of_terms = ("aggregation", "aggregation_divisor", "denominator")
        self.factors = factors(**{name: settings[name] for name in of_terms})
        self.entropy_factors = factors() if settings["entropy_own_mean"] else self.factors
        # Of a token by itself, before that.
        self.settings = settings | {
            "aggregation": "constant",
            "aggregation_divisor": 1.0,
            "denominator": None,
            "row_extremes": False,
        }
        self.entropy_coef = settings["entropy_coef"]

    def _pass(
        self, settings: dict[str, Any], numbers: dict, sizes: tuple[int, int], grad: Tensor
    ) -> None:
        stats = torch.empty(_STATS, dtype=torch.float64, device=grad.device)
        inputs = [numbers.get(argument.name) for argument in _lists.PPO_LOSS.inputs]
        options = tuple(settings[name] for name in _OPTIONS)
        addresses = _addresses(inputs, (stats, None, grad, None, None))
        _call(_lists.ppo_loss, stats, options, *sizes, *addresses)

    def chunk(self, rows: slice, gradients: Gradients, found: Tensor) -> None:
        """Log-probabilities and entropies of some rows, into ``found``, and their gradients."""
        work, head = self.work, self.work.head
        hidden, index = work.hidden[rows], work.index[rows]
        count, vocab = len(index), len(head.weight)
        buffer = self.buffer[: count * vocab]
        lowered = head.lowered(hidden)
        logits = head.logits(hidden, lowered, 0, vocab, buffer)
        z = logits if head.plain else head.transformed(logits, rows)
        sums = torch.empty(4, count, dtype=torch.float32, device=hidden.device)
        fold(z, index, tuple(sums), (0, vocab), True, work.options)
        logp, log_sum, entropy = finish(index, tuple(sums), vocab, work.options)
        found[0, rows], found[1, rows] = logp, entropy
        if not any(grad.numel() for grad in gradients.grads):
            return
        numbers = {name: None if x is None else x[rows] for name, x in self.of_tokens.items()}
        grad_logp = torch.empty_like(logp)
        settings = self.settings | {"entropy_coef": 0.0}
        self._pass(settings, {**numbers, "logp": logp}, (1, count), grad_logp)
        grad_logp *= self.factors[rows]
        grad_entropy = None
        if self.entropy_coef:
            grad_entropy = self.entropy_factors[rows] * -self.entropy_coef
        known = [sums[0], log_sum, entropy, grad_logp, grad_entropy]
        lowered_sums = gradients.lowered_sums(lowered)
        gradients.add(rows, (0, vocab), z, lowered, lowered_sums, known)
        gradients.add_adapter(rows, lowered_sums)
