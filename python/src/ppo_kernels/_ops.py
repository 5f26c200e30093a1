"""The ops of ``torch.ops.ppo_kernels``, for CPU and CUDA, with fake implementations and gradients.

``functional`` is what to call; this module is how it is done. For each op there is a generator,
which checks the arguments, yields the results as soon as they have buffers, and then has the C
library write them, which is not done for fake tensors; and for the differentiable ones how to go
backwards. What an op takes is in ``_lists``. Gradients of gradients are refused.

Tensors are taken as they are when they are contiguous, and copied when they are not; of logits
whose leading slices are contiguous, such as ``logits[:, :-1]``, each slice goes to the library on
its own, without a copy.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import byref, c_size_t
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import _C, Tensor

from . import _header, _lib, _lists
from ._lib import Options, Pass
from ._lists import FLAGS, MOMENTS, NUMBERS, Argument, numbers

_LOGITS = {getattr(torch, name): code for name, code in _lib.LOGITS.items()}
_TARGETS = {getattr(torch, name): code for name, code in _lib.TARGETS.items()}
BYTES = (torch.bool, torch.uint8, torch.int8)

_ops = torch.library.Library("ppo_kernels", "DEF")


# --- How an op is made ---


def _wants(*names: str) -> tuple[Argument, ...]:
    """Which results are wanted: what is not has no elements."""
    return tuple(Argument(f"want_{name}", "bool") for name in names)


def _options(options: Options) -> tuple[Argument, ...]:
    kinds = options.kinds.items()
    return tuple(Argument(name, "str" if isinstance(kind, tuple) else kind) for name, kind in kinds)


def _define(
    lists: Sequence[Sequence[Argument] | Options],
    results: str,
    function: Callable,
    backward: Callable | None = None,
    fake: Callable | None = None,
    **kept: Any,
) -> Any:
    """An op with the name of its function and the arguments of all lists, of which the function
    gets a tuple each, or, if there is one list only, its arguments. With a ``fake`` it is no
    generator. For ``backward`` see :func:`_differentiate`."""
    name = function.__name__.removeprefix("_")
    lists = [_options(each) if isinstance(each, Options) else each for each in lists]
    arguments = [argument for each in lists for argument in each]
    implementation = function
    if fake is None:
        parts = [slice(*ends) for ends in pairwise(accumulate(map(len, lists), initial=0))]
        split = tuple if len(lists) == 1 else lambda given: [given[part] for part in parts]

        def implementation(*given: Any) -> Any:
            (results,) = function(*split(given))  # to the end, for what it yielded
            return results

        def fake(*given: Any) -> Any:
            return next(function(*split(given)))

    takes = ", ".join(f"{argument.type} {argument.name}" for argument in arguments)
    _ops.define(f"{name}({takes}) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
    _ops.impl(name, implementation, "CPU")
    _ops.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"ppo_kernels::{name}", fake, lib=_ops)
    op = getattr(torch.ops.ppo_kernels, name).default
    if backward is not None:
        _differentiate(name, op, arguments, implementation, backward, **kept)
    return op


class _Once(torch.autograd.Function):
    """A gradient that has none itself, and says so when it is asked for it."""

    @staticmethod
    def once(grad: Tensor) -> Tensor:
        return _Once.apply(grad, grad.new_empty(0).requires_grad_())

    @staticmethod
    def forward(ctx, grad, _):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("ppo_kernels: gradients of gradients are not supported")


_BACKENDS = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)


def _differentiate(
    name: str,
    op: Any,
    arguments: Sequence[Argument],
    implementation: Callable,
    backward: Callable,
    differentiable: int = 1,
    kept: slice | None = None,
) -> None:
    """Gives an op its gradient, ``backward(ctx, *upstream)``, which returns those of the arguments
    that come first. ``ctx`` has the tensors that went in, or those that are ``kept``, with all
    results but the first, and as ``options`` what is not a tensor. Results after the first
    ``differentiable`` ones are constants.

    It does what ``torch.library.register_autograd`` does, with less to do for each call: where the
    dispatcher would go on to our own implementation, that is called at once.
    """
    count = len(arguments)
    tensors = sum(argument.type.startswith("Tensor") for argument in arguments)
    kept = slice(tensors) if kept is None else kept

    def below(keys: Any, inputs: tuple) -> Any:
        keys &= _C._after_autograd_keyset
        if keys.highestPriorityTypeId() in _BACKENDS:
            return implementation(*inputs)
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keys, *inputs)

    def forward(ctx: Any, keys: Any, *inputs: Any) -> Any:
        outputs = below(keys, inputs)
        ctx.set_materialize_grads(False)
        rest = outputs[1:] if isinstance(outputs, tuple) else ()
        ctx.save_for_backward(*inputs[kept], *rest)
        ctx.options = inputs[tensors:]
        ctx.mark_non_differentiable(*rest[differentiable - 1 :])
        return outputs

    def gradient(ctx: Any, *upstream: Tensor | None) -> tuple:
        if upstream[0] is None and all(grad is None for grad in upstream):
            return (None,) * (1 + count)
        if _C.is_grad_enabled():
            with torch.no_grad():
                found = backward(ctx, *upstream)
            found = [grad if grad is None else _Once.once(grad) for grad in found]
        else:
            found = backward(ctx, *upstream)
        return None, *found, *(None,) * (count - len(found))

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    function = type(f"ppo_kernels_{name}", (torch.autograd.Function,), members)

    def autograd(keys: Any, *inputs: Any) -> Any:
        if _C.is_grad_enabled() and _C._any_requires_grad(*inputs):
            return function.apply(keys, *inputs)
        return below(keys, inputs)

    _ops.impl(name, autograd, "Autograd", with_keyset=True)


def _call(function: Pass, like: Tensor, *values: int) -> None:
    """Calls the library for a tensor's device, with values in the order of the pass."""
    arguments = function.arguments(*values)
    if like.is_cpu:
        status = function.cpu(arguments)
    elif like.get_device() == torch.cuda.current_device():
        status = _call_cuda(function, like.device, arguments)
    else:
        with torch.cuda.device(like.device):
            status = _call_cuda(function, like.device, arguments)
    if status:
        _lib.fail(status)


def _call_cuda(function: Pass, device: torch.device, arguments: bytes) -> int:
    stream = torch.cuda.current_stream(device).cuda_stream
    size = c_size_t()
    status = function.workspace_size(arguments, stream, byref(size))
    if status:
        return status
    workspace = torch.empty(size.value, dtype=torch.uint8, device=device)
    return function.cuda(arguments, workspace.data_ptr(), size.value, stream)


# --- Buffers of results ---

# From this size on glibc gives every allocation a mapping of its own.
_OWN_MAPPING = 32 << 20
_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _large_pages(*results: Tensor) -> tuple[Tensor, ...]:
    """Buffers of results, as they are.

    Fresh memory of the CPU is handed over by the page when it is first written, which for pages of
    4 KiB takes ten times as long as the writing. So large results ask for large pages. Not for fake
    tensors, which have no memory.
    """
    for result in results:
        if result.nbytes >= _OWN_MAPPING and result.is_cpu and _madvise is not None:
            start = -(-result.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
            end = (result.data_ptr() + result.nbytes) // _LARGE_PAGE * _LARGE_PAGE
            _madvise(start, end - start, _MADV_HUGEPAGE)  # where it is refused, all is as before
    return results


def _wanted(like: Tensor, wanted: bool) -> Tensor:
    """A buffer for a result; if it is not wanted a tensor of no elements, whose address is null."""
    if wanted:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty(0, dtype=like.dtype, device=like.device)


# --- What is asked of arguments: messages are worded as the library's are. ---


def check_shape(op: str, name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{op}: `{name}` has shape {list(tensor.shape)}, expected {list(shape)}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: `{name}` is on device {tensor.device}, expected {device}")


def _refuse_dtype(op: str, name: str, tensor: Tensor, expected: str) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    raise ValueError(f"{op}: `{name}` has dtype {dtype}, expected {expected}")


_DTYPES = {
    NUMBERS: ((torch.float32,), "float32"),
    FLAGS: (BYTES, "bool or uint8"),
    MOMENTS: ((torch.float64,), "float64"),
}


def _checked(
    op: str,
    inputs: Sequence[Argument],
    tensors: Sequence[Tensor | None],
    like: Tensor,
    shape: Sequence[int] | None = None,
) -> list[Tensor | None]:
    """Tensors as the library takes them, of a shape, or that of ``like``, and on its device."""
    shape, device = like.shape if shape is None else torch.Size(shape), like.device
    checked = []
    for (name, _, kind, per_row), tensor in zip(inputs, tensors):
        if tensor is not None:
            dtypes, expected = _DTYPES[kind]
            if tensor.dtype not in dtypes:
                _refuse_dtype(op, name, tensor, expected)
            wanted = (3,) if kind == MOMENTS else shape[:-1] if per_row else shape
            if tensor.shape != wanted:
                check_shape(op, name, tensor, wanted)
            if tensor.device != device:
                check_device(op, name, tensor, device)
            tensor = tensor.contiguous()
        checked.append(tensor)
    return checked


def _check_rows(op: str, inputs: Sequence[Argument], tensors: Sequence[Tensor | None]) -> list:
    """:func:`_checked` of an op on rows of tokens."""
    like = tensors[0]
    if like.dim() == 0:
        raise ValueError(f"{op}: `{inputs[0].name}` has shape [], expected [..., seq_len]")
    return _checked(op, inputs, tensors, like)


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _at(tensor: Tensor | None, first: int) -> int:
    """The address of one of a tensor's elements."""
    return 0 if tensor is None else tensor.data_ptr() + first * tensor.element_size()


def _logits_type(op: str, name: str, logits: Tensor) -> int:
    code = _LOGITS.get(logits.dtype)
    if code is None:
        _refuse_dtype(op, name, logits, "float32, float16 or bfloat16")
    if logits.dim() == 0:
        raise ValueError(f"{op}: `{name}` has shape [], expected [..., vocab]")
    return code


def _blocks(rows: int, *logits: Tensor) -> Iterable[tuple[tuple[Tensor, ...], int, int]]:
    """Contiguous parts of logits, the same of each, that make up the whole: each with its first row
    and its rows."""
    for tensor in logits:
        if not tensor.is_contiguous():
            return _slices(rows, *logits)
    return ((logits, 0, rows),)


def _slices(rows: int, *logits: Tensor) -> Iterator[tuple[tuple[Tensor, ...], int, int]]:
    if logits[0].dim() > 2 and rows and all(tensor[0].is_contiguous() for tensor in logits):
        each = rows // len(logits[0])
        for index, parts in enumerate(zip(*(tensor.unbind() for tensor in logits))):
            yield parts, index * each, each
    else:
        yield tuple(tensor.contiguous() for tensor in logits), 0, rows


# --- logprob ---


def check_logprob(op: str, logits: Tensor, index: Tensor) -> tuple[int, int]:
    logits_type = _logits_type(op, "logits", logits)
    index_type = _TARGETS.get(index.dtype)
    if index_type is None:
        _refuse_dtype(op, "index", index, "int64 or int32")
    check_shape(op, "index", index, logits.shape[:-1])
    check_device(op, "index", index, logits.device)
    return logits_type, index_type


def _logprob_options(index: Tensor, temperature: float, ignore_index: int | None) -> int:
    if temperature == 1.0 and ignore_index is None:
        return 0
    if ignore_index is not None and index.dtype is torch.int32:
        ignore_index &= 0xFFFF_FFFF  # the library reads int32 as uint32: the same bits
    return _lists.logprob_options.address(temperature, ignore_index)


def _logprob_forward(
    op: str, with_entropy: bool, logits: Tensor, index: Tensor, *options: Any
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    types = check_logprob(op, logits, index)
    f32 = torch.float32
    logp = torch.empty_like(index, dtype=f32, memory_format=torch.contiguous_format)
    entropy = torch.empty_like(logp) if with_entropy else None
    stats = torch.empty(2, *index.shape, dtype=f32, device=logits.device)
    yield (logp, entropy, stats) if with_entropy else (logp, stats)
    options = _logprob_options(index, *options)
    index = index.contiguous()
    total, vocab = index.numel(), logits.shape[-1]
    for (part,), first, rows in _blocks(total, logits):
        inputs = (rows, vocab, *types, part.data_ptr(), _at(index, first))
        kept = stats.data_ptr() + 4 * first
        results = (_at(entropy, first), options, _at(logp, first))
        _call(_lists.logprob_forward, logits, *inputs, kept, kept + 4 * total, *results)


def _logprob(*arguments: Any) -> Iterator[tuple[Tensor, Tensor]]:
    return _logprob_forward("selective_log_softmax", False, *arguments)


def _logprob_entropy(*arguments: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return _logprob_forward("logprobs_and_entropy", True, *arguments)


def _logprob_backward(logits: Tensor, index: Tensor, *rest: Any) -> Iterator[Tensor]:
    op = "logprob_backward"
    types = check_logprob(op, logits, index)
    *options, stats, entropy, grad_logp, grad_entropy = rest
    (stats,) = _checked(op, _STATS, (stats,), logits, (2, *index.shape))
    upstream = _checked(op, _lists.LOGPROB_GRADIENTS, (entropy, grad_logp, grad_entropy), index)
    grad_logits = _wanted(logits, True)
    yield grad_logits
    _large_pages(grad_logits)
    options = _logprob_options(index, *options)
    index = index.contiguous()
    total, vocab = index.numel(), logits.shape[-1]
    for (part,), first, rows in _blocks(total, logits):
        inputs = (rows, vocab, *types, part.data_ptr(), _at(index, first))
        kept = stats.data_ptr() + 4 * first
        gradients = [_at(gradient, first) for gradient in upstream]
        buffer = _at(grad_logits, first * vocab)
        inputs += (kept, kept + 4 * total, *gradients)
        _call(_lists.logprob_backward, logits, *inputs, options, buffer)


def _backward_of_logprob(ctx: Any, grad_logp: Tensor | None, *rest: Tensor | None) -> tuple:
    logits, index, *entropy, stats = ctx.saved_tensors
    gradients = (entropy[0] if entropy else None, grad_logp, rest[0])
    return (logprob_backward(logits, index, *ctx.options, stats, *gradients),)


_STATS = (numbers("stats"),)
_LOGPROB = (*_lists.LOGPROB, *_options(_lists.logprob_options))

logprob = _define([_LOGPROB], "(Tensor logp, Tensor stats)", _logprob, _backward_of_logprob)
logprob_entropy = _define(
    [_LOGPROB],
    "(Tensor logp, Tensor entropy, Tensor stats)",
    _logprob_entropy,
    _backward_of_logprob,
    differentiable=2,
)
logprob_backward = _define(
    [(*_LOGPROB, *_STATS, *_lists.LOGPROB_GRADIENTS)], "Tensor", _logprob_backward
)


# --- logprob of several tokens a row ---


def _check_many(logits: Tensor, index: Tensor) -> None:
    op = "selective_log_softmax"
    _logits_type(op, "logits", logits)
    if _TARGETS.get(index.dtype) is None:
        _refuse_dtype(op, "index", index, "int64 or int32")
    check_shape(op, "index", index, torch.Size((*logits.shape[:-1], *index.shape[-1:])))
    check_device(op, "index", index, logits.device)


def _places(index: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Ids that can be looked up, and where there were others, which is an error on the CPU."""
    index = index.long()
    outside = (index < 0) | (index >= vocab)
    if index.is_cpu and outside.any():
        row, column = outside.reshape(-1, index.shape[-1]).nonzero()[0].tolist()
        raise ValueError(
            f"selective_log_softmax: `index`[{row}, {column}] is {index[outside][0]}, expected"
            f" 0..{vocab}"
        )
    return index.clamp(0, vocab - 1), outside


def _one_of(places: Tensor) -> Tensor:
    """Some token of each row."""
    return places[..., 0] if places.shape[-1] else places.new_zeros(places.shape[:-1])


def _at_places(logits: Tensor, places: Tensor, temperature: float, stats: Tensor) -> Tensor:
    largest, log_sum = stats.unsqueeze(-1)
    return (logits.gather(-1, places).float() - largest) / temperature - log_sum


def _logprobs(logits: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One pass over the logits for the normaliser of each row, then K numbers of each row."""
    _check_many(logits, index)
    places, outside = _places(index, logits.shape[-1])
    ((_, stats),) = _logprob(logits, _one_of(places), temperature, None)
    logp = _at_places(logits, places, temperature, stats)
    return logp.masked_fill_(outside, torch.nan), stats


def _logprobs_fake(logits: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    _check_many(logits, index)
    rows = logits.shape[:-1]
    logp = logits.new_empty(index.shape, dtype=torch.float32)
    return logp, logits.new_empty((2, *rows), dtype=torch.float32)


def _logprobs_backward(
    logits: Tensor, index: Tensor, temperature: float, stats: Tensor, grad: Tensor
) -> Tensor:
    """With G the sum of a row's upstream gradients, -G p_j / T everywhere, and the sum of those of
    token j on top of it where j is chosen. The chosen ones are formed in single precision. A row
    with a gradient for an id outside of the vocabulary is NaN, as with one token a row."""
    places, outside = _places(index, logits.shape[-1])
    nowhere = (outside & (grad != 0)).any(-1)
    total = grad.sum(-1).masked_fill_(nowhere, torch.nan)
    given = (logits, _one_of(places), temperature, None, stats, None, total, None)
    (grad_logits,) = _logprob_backward(*given)
    same = places.unsqueeze(-1) == places.unsqueeze(-2)
    of_token = torch.where(same, grad.unsqueeze(-2), 0.0).sum(-1)
    # What is not in the vocabulary has another's place: all that is written there is the same.
    p = _at_places(logits, places, temperature, stats).exp()
    chosen = (of_token - total.unsqueeze(-1) * p) / temperature
    return grad_logits.scatter_(-1, places, chosen.to(grad_logits.dtype))


def _backward_of_logprobs(ctx: Any, grad_logp: Tensor, _: None) -> tuple:
    logits, index, stats = ctx.saved_tensors
    return (logprobs_backward(logits, index, *ctx.options, stats, grad_logp),)


def _logprobs_backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return _wanted(logits, True)


_LOGPROBS = (*_lists.LOGPROB, *_options(_lists.logprob_options)[:1])  # without ignore_index

logprobs = _define(
    [_LOGPROBS], "(Tensor logp, Tensor stats)", _logprobs, _backward_of_logprobs, _logprobs_fake
)
logprobs_backward = _define(
    [(*_LOGPROBS, *_STATS, numbers("grad_logp"))],
    "Tensor",
    _logprobs_backward,
    fake=_logprobs_backward_fake,
)


# --- kl ---


def _token_kl(tensors: tuple, options: tuple) -> Iterator[Tensor]:
    inputs = _checked("token_kl", _lists.TOKEN_KL, tensors, tensors[0])
    kl = torch.empty_like(inputs[0])
    yield kl
    _large_pages(kl)
    options = _lists.token_kl_options.address(*options)
    _call(_lists.token_kl_forward, kl, kl.numel(), *_addresses(inputs), options, kl.data_ptr())


def _token_kl_backward(
    tensors: tuple, options: tuple, upstream: tuple, wanted: tuple
) -> Iterator[tuple[Tensor, ...]]:
    op, logp = "token_kl_backward", tensors[0]
    inputs = _checked(op, (*_lists.TOKEN_KL, *_GRAD_KL), (*tensors, *upstream), logp)
    gradients = tuple(_wanted(logp, want) for want in wanted)
    yield gradients
    _large_pages(*gradients)
    *addresses, grad_kl = _addresses(inputs)
    results = (_lists.token_kl_options.address(*options), grad_kl, *_addresses(gradients))
    _call(_lists.token_kl_backward, logp, logp.numel(), *addresses, *results)


def _backward_of_kl(ctx: Any, grad_kl: Tensor, *_: None) -> list[Tensor | None]:
    """Of either op."""
    inputs, stats = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    wanted = ctx.needs_input_grad[1:3]  # the first input is not the op's
    backward = full_kl_backward if stats else token_kl_backward
    gradients = backward(*inputs, *ctx.options, *stats, grad_kl, *wanted)
    return [gradient if want else None for gradient, want in zip(gradients, wanted)]


_GRAD_KL = (numbers("grad_kl"),)

token_kl = _define([_lists.TOKEN_KL, _lists.token_kl_options], "Tensor", _token_kl, _backward_of_kl)
token_kl_backward = _define(
    [_lists.TOKEN_KL, _lists.token_kl_options, _GRAD_KL, _wants("logp", "ref")],
    "(Tensor grad_logp, Tensor grad_ref_logp)",
    _token_kl_backward,
)


def _check_full_kl(
    op: str, logits: Tensor, ref_logits: Tensor, mask: Tensor | None
) -> tuple[int, Tensor | None]:
    logits_type = _logits_type(op, "logits", logits)
    if ref_logits.dtype is not logits.dtype:
        _refuse_dtype(op, "ref_logits", ref_logits, str(logits.dtype).removeprefix("torch."))
    check_shape(op, "ref_logits", ref_logits, logits.shape)
    check_device(op, "ref_logits", ref_logits, logits.device)
    return logits_type, *_checked(op, _lists.FULL_KL[2:], (mask,), logits)


def _full_kl_inputs(
    logits_type: int, logits: Tensor, ref_logits: Tensor, mask: Tensor | None
) -> Iterator[tuple[int, int, list[int]]]:
    """For each part its first row, its rows, and what the passes begin with."""
    vocab = logits.shape[-1]
    for parts, first, rows in _blocks(logits.shape[:-1].numel(), logits, ref_logits):
        yield first, rows, [rows, vocab, logits_type, *_addresses(parts), _at(mask, first)]


def _stats_of(stats: Tensor, first: int, rows: int) -> Tensor:
    return stats.view(len(stats), -1)[:, first : first + rows]


def _full_kl(tensors: tuple, options: tuple) -> Iterator[tuple[Tensor, Tensor]]:
    logits, ref_logits, mask = tensors
    logits_type, mask = _check_full_kl("full_kl", *tensors)
    kl = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    stats = kl.new_empty((_header.KL_FULL_STATS, *kl.shape))
    yield kl, stats
    options = _lists.full_kl_options.address(*options)
    for first, rows, inputs in _full_kl_inputs(logits_type, logits, ref_logits, mask):
        buffer = stats if rows == kl.numel() else stats.new_empty(len(stats), rows)
        _call(_lists.full_kl_forward, logits, *inputs, options, buffer.data_ptr())
        if buffer is not stats:
            _stats_of(stats, first, rows).copy_(buffer)
    kl.copy_(stats[0])


def _full_kl_backward(
    tensors: tuple, options: tuple, upstream: tuple, wanted: tuple
) -> Iterator[tuple[Tensor, ...]]:
    op = "full_kl_backward"
    (logits, ref_logits, mask), (stats, grad_kl) = tensors, upstream
    logits_type, mask = _check_full_kl(op, *tensors)
    rows = logits.shape[:-1]
    (stats,) = _checked(op, _STATS, (stats,), logits, (_header.KL_FULL_STATS, *rows))
    (grad_kl,) = _checked(op, _GRAD_KL, (grad_kl,), logits, rows)
    gradients = tuple(_wanted(logits, want) for want in wanted)
    yield gradients
    _large_pages(*gradients)
    options = _lists.full_kl_options.address(*options)
    for first, rows, inputs in _full_kl_inputs(logits_type, logits, ref_logits, mask):
        part_stats = _stats_of(stats, first, rows).contiguous()
        begin = first * logits.shape[-1]
        buffers = [_at(grad, begin) if want else 0 for grad, want in zip(gradients, wanted)]
        given = (options, part_stats.data_ptr(), _at(grad_kl, first))
        _call(_lists.full_kl_backward, logits, *inputs, *given, *buffers)


full_kl = _define(
    [_lists.FULL_KL, _lists.full_kl_options], "(Tensor kl, Tensor stats)", _full_kl, _backward_of_kl
)
full_kl_backward = _define(
    [_lists.FULL_KL, _lists.full_kl_options, (*_STATS, *_GRAD_KL), _wants("logits", "ref")],
    "(Tensor grad_logits, Tensor grad_ref_logits)",
    _full_kl_backward,
)


# --- gae ---


def _moments_like(values: Tensor) -> Tensor:
    return torch.empty(3, dtype=torch.float64, device=values.device)


def _sizes(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[:-1].numel(), tensor.shape[-1]


def _gae(tensors: tuple, wanted: tuple, options: tuple) -> Iterator[tuple[Tensor, ...]]:
    inputs = _check_rows("gae", _lists.GAE, tensors)
    values = inputs[0]
    of_tokens = (_wanted(values, want) for want in (True, True, *wanted))
    outputs = (*of_tokens, _moments_like(values))
    yield outputs
    _large_pages(*outputs)
    given = (*_sizes(values), *_addresses(inputs), _lists.gae_options.address(*options))
    _call(_lists.gae, values, *given, *_addresses(outputs))


gae = _define(
    [_lists.GAE, _wants("rewards"), _lists.gae_options],
    "(Tensor advantages, Tensor returns, Tensor rewards, Tensor moments)",
    _gae,
)


# --- whiten ---


def _masked_moments(values: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    inputs = _checked("masked_moments", _lists.WHITEN, (values, mask), values)
    moments = _moments_like(values)
    yield moments
    _call(_lists.whiten_moments, values, values.numel(), *_addresses((*inputs, moments)))


def _masked_whiten_with(tensors: tuple, options: tuple) -> Iterator[Tensor]:
    op, like = "masked_whiten", tensors[0]
    inputs = _checked(op, (*_lists.WHITEN, *_MOMENTS), tensors, like)
    whitened = torch.empty_like(inputs[0])
    yield whitened
    _large_pages(whitened)
    given = (like.numel(), *_addresses(inputs), _lists.whiten_options.address(*options))
    _call(_lists.whiten_forward, like, *given, whitened.data_ptr())


def _masked_whiten(tensors: tuple, options: tuple) -> Iterator[tuple[Tensor, Tensor]]:
    like = tensors[0]
    inputs = _checked("masked_whiten", _lists.WHITEN, tensors, like)
    whitened, moments = torch.empty_like(inputs[0]), _moments_like(like)
    yield whitened, moments
    _large_pages(whitened)
    given = (like.numel(), *_addresses((*inputs, moments)))
    _call(_lists.whiten_moments, like, *given)
    options = _lists.whiten_options.address(*options)
    _call(_lists.whiten_forward, like, *given, options, whitened.data_ptr())


def _masked_whiten_backward(tensors: tuple, options: tuple) -> Iterator[Tensor]:
    """Through the moments too where the values are given."""
    *_, like = tensors
    inputs = _checked("masked_whiten_backward", _WHITEN_BACKWARD, tensors, like)
    grad_values = _wanted(like, True)
    yield grad_values
    _large_pages(grad_values)
    values, *rest = _addresses(inputs)
    rest += [_lists.whiten_options.address(*options), grad_values.data_ptr()]
    if tensors[0] is None:
        _call(_lists.whiten_with_backward, like, like.numel(), *rest)
    else:
        _call(_lists.whiten_backward, like, like.numel(), values, *rest)


def _backward_of_whiten(ctx: Any, grad: Tensor, *_: None) -> tuple:
    saved = (None, *ctx.saved_tensors)[-3:]  # without the values where moments are constants
    return (masked_whiten_backward(*saved, grad, *ctx.options),)


_MOMENTS = (Argument("moments", "Tensor", MOMENTS),)
_GRAD = (numbers("grad"),)
_WHITEN_BACKWARD = (numbers("values?"), *_lists.WHITEN[1:], *_MOMENTS, *_GRAD)

masked_moments = _define([_lists.WHITEN], "Tensor", _masked_moments)
masked_whiten = _define(
    [_lists.WHITEN, _lists.whiten_options],
    "(Tensor whitened, Tensor moments)",
    _masked_whiten,
    _backward_of_whiten,
)
masked_whiten_with = _define(
    [(*_lists.WHITEN, *_MOMENTS), _lists.whiten_options],
    "Tensor",
    _masked_whiten_with,
    _backward_of_whiten,
    kept=slice(1, 3),
)
masked_whiten_backward = _define(
    [_WHITEN_BACKWARD, _lists.whiten_options], "Tensor", _masked_whiten_backward
)


# --- ppo_loss ---


def _ppo_loss(tensors: tuple, wanted: tuple, options: tuple) -> Iterator[tuple[Tensor, ...]]:
    inputs = _check_rows("ppo_loss", _lists.PPO_LOSS, tensors)
    logp = inputs[0]
    loss = torch.empty((), dtype=torch.float32, device=logp.device)
    stats = torch.empty(len(_lib.STATS), dtype=torch.float32, device=logp.device)
    gradients = [_wanted(logp, want) for want in wanted]
    yield loss, stats, *gradients
    _large_pages(*gradients)
    exact = torch.empty_like(stats, dtype=torch.float64)
    given = (*_sizes(logp), *_addresses(inputs), _lists.ppo_loss_options.address(*options))
    _call(_lists.ppo_loss, logp, *given, *_addresses((exact, loss, *gradients)))
    stats.copy_(exact)


def _ppo_loss_backward(grad: Tensor, *stored: Tensor) -> Iterator[tuple[Tensor, ...]]:
    (grad,) = _checked("ppo_loss_backward", _GRAD, (grad,), stored[0], ())
    gradients = tuple(torch.empty_like(gradient) for gradient in stored)
    yield gradients
    _large_pages(*gradients)
    tokens = max(gradient.numel() for gradient in stored)
    _call(_lists.ppo_loss_scale, grad, tokens, *_addresses((grad, *stored, *gradients)))


def _backward_of_ppo_loss(ctx: Any, grad: Tensor, *_: None) -> list[Tensor | None]:
    _, *stored = ctx.saved_tensors
    # After loss.backward() the stored ones are what is wanted. Looking costs nothing on the CPU.
    as_stored = type(grad) is Tensor and grad.is_cpu and grad.item() == 1.0
    scaled = stored if as_stored else ppo_loss_backward(grad, *stored)
    gradients = dict(zip(_lists.PPO_LOSS_GRADIENTS, scaled))
    # What else asks for a gradient, old_logp say, is a constant.
    needs = zip(_lists.PPO_LOSS, ctx.needs_input_grad[1:])
    return [gradients.get(argument.name) if needed else None for argument, needed in needs]


_STORED = [f"grad_{name}" for name in _lists.PPO_LOSS_GRADIENTS]

ppo_loss = _define(
    [_lists.PPO_LOSS, _wants(*_lists.PPO_LOSS_GRADIENTS), _lists.ppo_loss_options],
    f"(Tensor loss, Tensor stats, {', '.join(f'Tensor {name}' for name in _STORED)})",
    _ppo_loss,
    _backward_of_ppo_loss,
    kept=slice(0),
)
ppo_loss_backward = _define(
    [(*_GRAD, *map(numbers, _STORED))],
    f"({', '.join('Tensor' for _ in _STORED)})",
    _ppo_loss_backward,
)
