"""The ops of ``torch.ops.ppo_kernels``, for CPU and CUDA, with fake implementations and gradients.

``functional`` is what to call; this module is how it is done. An op is a generator, which checks
the arguments, yields the results as soon as they have buffers, and then has the C library write
them, which is not done for fake tensors; a differentiable one has another function to go backwards.
What an op takes is in ``_lists``. Gradients of gradients are refused.

Tensors are taken as they are when they are contiguous, and copied when they are not; of logits
whose leading slices are contiguous, such as ``logits[:, :-1]``, each slice goes to the library on
its own, without a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from ctypes import byref, c_size_t
from math import nan
from typing import Any, NamedTuple

import torch
from torch import _C, SymFloat, SymInt, Tensor
from torch.autograd import forward_ad

from . import _header, _lib, _lists
from ._lib import Pass
from ._lists import FLAGS, INTEGERS, MOMENTS, NUMBERS, OFFSETS, OTHER, Op, check_rows, check_shape

_LOGITS = {getattr(torch, name): code for name, code in _lib.LOGITS.items()}
_TARGETS = {getattr(torch, name): code for name, code in _lib.TARGETS.items()}
BYTES = (torch.bool, torch.uint8, torch.int8)

_ops = torch.library.Library("ppo_kernels", "DEF")


# --- How an op is made ---

Results = Iterator[Tensor | tuple[Tensor, ...]]


def _op(
    takes: Op,
    results: str = "",
    backward: Callable | None = None,
    wants: str = "",
    size: str = "",
    **kept: Any,
) -> Callable[[Callable], Any]:
    """Makes an op of a generator, of the same name, which gets a tuple of tensors, behind them the
    ``size`` that they do not say, if there is one, and a tuple of the rest: whether each of
    ``wants`` is wanted, and options. Several results have names. For
    ``backward`` see :func:`_differentiate`. Where it has options that are numbers, there is a form
    of it, ``.._moving``, that takes those of them that are NaN from a tensor after the others."""
    tensors = [f"{argument.type} {argument.name}" for argument in takes.inputs]
    tensors += [f"int {name}" for name in size.split()]
    kinds = takes.options.kinds.items() if takes.options else ()
    options = [f"{_schema_type(kind)} {name}" for name, kind in kinds]
    flags, count = [f"bool want_{name}" for name in wants.split()], len(tensors)
    kept.setdefault("kept", range(len(takes.inputs)))  # sizes are no tensors
    gives = ", ".join(f"Tensor {name}" for name in results.split())

    def define(function: Callable[..., Results]) -> Any:
        def implementation(*given: Any) -> Any:
            (results,) = function(given[:count], given[count:])  # to its end
            return results

        def fake(*given: Any) -> Any:
            return next(function(given[:count], given[count:]))

        def of_moving(*given: Any) -> Any:
            rest = _filled_in(given[count + 1 :], given[count].tolist())
            return implementation(*given[:count], *rest)

        def fake_of_moving(*given: Any) -> Any:
            return fake(*given[:count], *given[count + 1 :])

        def form(
            name: str, numbers: Sequence[str], implementation: Callable, fake: Callable
        ) -> Any:
            arguments = ", ".join((*tensors, *numbers, *flags, *options))
            schema = f"{name}({arguments}) -> {f'({gives})' if gives else 'Tensor'}"
            _ops.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            _ops.impl(name, implementation, "CPU")
            _ops.impl(name, implementation, "CUDA")
            torch.library.register_fake(f"ppo_kernels::{name}", fake, lib=_ops)
            return getattr(torch.ops.ppo_kernels, name).default

        name = function.__name__
        op = form(name, (), implementation, fake)
        if any(kind in ("float", "float?") for _, kind in kinds):
            moving = form(f"{name}_moving", ("Tensor numbers",), of_moving, fake_of_moving)
            _moving[op] = _Moving(moving, takes, count, count + len(flags))
            _differentiate(f"{name}_moving", moving, count, of_moving, backward, True, **kept)
        _differentiate(name, op, count, implementation, backward, **kept)
        return op

    return define


def _schema_type(kind: str | tuple[str, ...]) -> str:
    """A number may be symbolic, which what schemas call a float may not."""
    return "str" if isinstance(kind, tuple) else kind.replace("float", "Scalar")


# --- Options that move ---
#
# torch.compile makes a constant of a number that an op takes, and compiles anew when it changes. So
# where it has a symbol for a number, or is given a tensor, the op's other form takes its place.


_SYMBOLS = (SymFloat, SymInt)


class _Moving(NamedTuple):
    """The form of an op that takes numbers from a tensor, and how many ``tensors`` and how many
    arguments in all come before the options."""

    form: Any
    op: Op
    tensors: int
    before: int

    def arguments(self, given: Sequence[Any]) -> tuple:
        """The form's, of those of the op."""
        rest = given[self.tensors :]
        # With it what is NaN, which would be taken for one of them.
        moving = [isinstance(value, (*_SYMBOLS, Tensor)) or value != value for value in rest]
        numbers = torch.stack([_as_tensor(value) for value, moves in zip(rest, moving) if moves])
        settled = (nan if moves else value for value, moves in zip(rest, moving))
        return *given[: self.tensors], numbers, *settled

    def check(self, given: Sequence[Any]) -> None:
        """Refuses a tensor of several numbers, and one for which a device would be waited for."""
        for name, value in zip(self.op.options.kinds, given[self.before :]):
            if isinstance(value, Tensor):
                option = f"{self.op.name}: option `{name}` is a tensor"
                if value.dim():
                    raise ValueError(f"{option} of shape {list(value.shape)}, expected one number")
                if not value.is_cpu:
                    raise ValueError(f"{option} on device {value.device}, expected cpu")


_moving: dict[Any, _Moving] = {}


def _as_tensor(value: float | SymFloat | SymInt | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().double()
    # A sum, which torch.compile knows how to keep symbolic.
    return torch.zeros((), dtype=torch.float64, device="cpu") + value


def _filled_in(rest: Sequence[Any], numbers: Iterable[Any]) -> tuple:
    """What comes after an op's tensors, with numbers where NaN stands for them."""
    numbers = iter(numbers)
    return tuple(next(numbers) if value != value else value for value in rest)


def call(op: Any, *given: Any) -> Any:
    """An op of arguments of which those that are numbers may be tensors of one."""
    moving = _moving[op]
    for value in given[moving.before :]:
        if isinstance(value, Tensor):
            break
    else:
        return op(*given)
    moving.check(given)
    if torch.compiler.is_compiling():
        return moving.form(*moving.arguments(given))
    return op(*given[: moving.before], *map(_as_number, given[moving.before :]))


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


# --- Gradients ---

_BACKENDS = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)
# Dispatch keys below autograd by those above it; none where our implementation is next.
_below_autograd: dict[int, _C.DispatchKeySet | None] = {}


def _differentiate(
    name: str,
    op: Any,
    tensors: int,
    implementation: Callable,
    backward: Callable | None,
    moves: bool = False,
    *,
    kept: Sequence[int],
    differentiable: int = 1,
    saved: int | None = None,
) -> None:
    """Gives an op its gradient, ``backward(ctx, *upstream)``, which returns those of the arguments
    that come first; without it there is none, and asking for it is an error. ``ctx`` has the
    tensors that are ``kept`` of those that went in, which are all that have a gradient at least,
    with all results but the first, or so many of them as are ``saved``, and as ``options`` what
    comes behind the first ``tensors`` arguments. Results after the first ``differentiable`` ones
    are constants. ``moves`` is true for the form of an op that takes numbers from a tensor.

    It does what ``torch.library.register_autograd`` does, with less to do for each call: where the
    dispatcher would go on to our own implementation, that is called at once.
    """
    count = len(op._schema.arguments)
    moving = _moving.get(op)

    def below(keys: Any, inputs: tuple) -> Any:
        known = keys.raw_repr()
        if known not in _below_autograd:
            keys &= _C._after_autograd_keyset
            ours = keys.highestPriorityTypeId() in _BACKENDS
            _below_autograd[known] = None if ours else keys
        keys = _below_autograd[known]
        if keys is None:
            return implementation(*inputs)
        with _C._AutoDispatchBelowAutograd():
            if moving and any(isinstance(given, _SYMBOLS) for given in inputs):
                return moving.form(*moving.arguments(inputs))
            return op.redispatch(keys, *inputs)

    def forward(ctx: Any, keys: Any, *inputs: Any) -> Any:
        outputs = below(keys, inputs)
        ctx.set_materialize_grads(False)
        rest = outputs[1:] if isinstance(outputs, tuple) else ()
        ctx.save_for_backward(*(inputs[place] for place in kept), *rest[:saved])
        ctx.options = inputs[tensors:]
        if moves:
            numbers, *options = ctx.options
            ctx.options = _filled_in(options, numbers.unbind())
        ctx.mark_non_differentiable(*rest[differentiable - 1 :])
        return outputs

    def gradient(ctx: Any, *upstream: Tensor | None) -> tuple:
        if upstream[0] is None and all(grad is None for grad in upstream):
            return (None,) * (1 + count)
        if backward is None:
            raise RuntimeError(f"ppo_kernels: {name} has no gradient")
        if _C.is_grad_enabled():
            with torch.no_grad():
                found = backward(ctx, *upstream)
            found = _Once.apply(len(found), *found, *ctx.saved_tensors, *upstream)
        else:
            found = backward(ctx, *upstream)
        return None, *found, *(None,) * (count - len(found))

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    function = type(f"ppo_kernels_{name}", (torch.autograd.Function,), members)

    def autograd(keys: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(inputs)
        if _C.is_grad_enabled() and _C._any_requires_grad(*inputs):
            if _C._are_functorch_transforms_active():
                raise RuntimeError("ppo_kernels: gradients by torch.func are not supported")
            return function.apply(keys, *inputs)
        return below(keys, inputs)

    _ops.impl(name, autograd, "Autograd", with_keyset=True)


class _Once(torch.autograd.Function):
    """Gradients, tied to what they were made of, which say that they have none themselves when they
    are asked for it, by whatever way."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(grad if grad is None else grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("ppo_kernels: gradients of gradients are not supported")


def _refuse_tangents(inputs: tuple) -> None:
    for tensor in inputs:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError("ppo_kernels: forward-mode differentiation is not supported")


# --- How the library is called ---


def _team_of_torch() -> int | None:
    """The address of what has torch's own OpenMP threads do work. They wait for more by spinning:
    beside them others would be short of cores."""
    if not torch.backends.openmp.is_available():
        return None
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        with contextlib.suppress(OSError, AttributeError):
            # Whichever runtime it is, torch's libraries have loaded it.
            function = ctypes.CDLL(os.path.join(folder, name)).GOMP_parallel
            return ctypes.cast(function, ctypes.c_void_p).value
    return None


_lib.set_team(_team_of_torch())


class _Thread(threading.local):
    def __init__(self) -> None:
        # Asking has torch tell OpenMP the number of this thread's.
        self.threads = torch.get_num_threads()


_thread = _Thread()


def _call(
    function: Pass, like: Tensor, options: Sequence[Any], *values: int, **renamed: str
) -> None:
    """Calls the library for a tensor's device, with values in the order of the pass. Without values
    options are the defaults. For errors an argument may be ``renamed`` once more."""
    options = function.options.address(*options) if options else 0
    arguments = function.arguments(options, *values)
    if like.is_cpu:
        _thread.threads  # noqa: B018
        status = function.cpu(arguments)
    elif like.get_device() == torch.cuda.current_device():
        status = _call_cuda(function, like.device, arguments)
    else:
        with torch.cuda.device(like.device):
            status = _call_cuda(function, like.device, arguments)
    if status:
        _lib.fail(status, {**function.renamed, **renamed})


# What ``torch.cuda.current_stream`` asks too, and makes an object of.
_raw_stream = getattr(_C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)


def _call_cuda(function: Pass, device: torch.device, arguments: bytes) -> int:
    stream = _raw_stream(device.index)
    # Most passes need no workspace, and none is asked about it before it has been refused without.
    if not function.needs_workspace:
        status = function.cuda(arguments, 0, 0, stream)
        if status != _header.STATUS_WORKSPACE:
            return status
        function.needs_workspace = True
    size = c_size_t()
    status = function.workspace_size(arguments, stream, byref(size))
    if status:
        return status
    workspace = torch.empty(size.value, dtype=torch.uint8, device=device)
    return function.cuda(arguments, workspace.data_ptr(), size.value, stream)


_EMPTY = 64  # the address of what is there but has no elements: 0 is for what is not there


def _addresses(
    inputs: Sequence[Tensor | None], results: Sequence[Tensor | None] = (), number: int = 0
) -> list[int]:
    """Those of the tensors' slices of this number, 0 for one that is not there and for a result of
    no elements, which is not wanted."""
    found = [0 if tensor is None else tensor.data_ptr() or _EMPTY for tensor in inputs]
    found += [0 if tensor is None else tensor.data_ptr() for tensor in results]
    if number:
        for place, tensor in enumerate((*inputs, *results)):
            if found[place]:
                found[place] += number * tensor.stride(0) * tensor.element_size()
    return found


# --- Buffers of results ---

# From this size on glibc gives every allocation a mapping of its own.
_OWN_MAPPING = 32 << 20
_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _result(like: Tensor, wanted: bool = True, shape: Sequence[int] | None = None) -> Tensor:
    """A buffer for a result, of another shape where one is given; if it is not wanted a tensor of
    no elements, whose address is null.

    Fresh memory of the CPU is handed over by the page when it is first written, which for pages of
    4 KiB takes ten times as long as the writing. So large results ask for large pages. Not fake
    ones, which have no memory.
    """
    if not wanted:
        return torch.empty(0, dtype=like.dtype, device=like.device)
    if shape is None:
        result = torch.empty_like(like, memory_format=torch.contiguous_format)
    else:
        result = like.new_empty(shape)
    large = type(result) is Tensor and result.nbytes >= _OWN_MAPPING
    if large and result.is_cpu and _madvise is not None:
        start = -(-result.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        end = (result.data_ptr() + result.nbytes) // _LARGE_PAGE * _LARGE_PAGE
        _madvise(start, end - start, _MADV_HUGEPAGE)  # where it is refused, all is as before
    return result


# --- What is asked of arguments ---


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        _lists.refuse(op, name, f"is on device {tensor.device}", device)


def _refuse_dtype(op: str, name: str, tensor: Tensor, expected: str | torch.dtype) -> None:
    dtype, expected = (str(given).removeprefix("torch.") for given in (tensor.dtype, expected))
    _lists.refuse(op, name, f"has dtype {dtype}", expected)


_DTYPES = {
    NUMBERS: ((torch.float32,), "float32"),
    FLAGS: (BYTES, "bool or uint8"),
    INTEGERS: ((torch.int64,), "int64"),
    OFFSETS: ((torch.int64,), "int64"),
    MOMENTS: ((torch.float64,), "float64"),
}


def _checked(
    op: Op,
    tensors: tuple,
    like: Tensor | None = None,
    shape: tuple | None = None,
    rows: tuple | None = None,
    per_row_too: Collection[str] = (),
) -> list[Tensor | None]:
    """An op's tensors as the library takes them, of a shape, or that of ``like``, and on its
    device. Without those it is the first tensor. What there is one of for a row, by the op's list
    or by one of these options, is of the shape ``rows``, or of that without its last
    dimension."""
    like = tensors[0] if like is None else like
    shape, device = like.shape if shape is None else shape, like.device
    rows = shape[:-1] if rows is None else rows
    checked = []
    for (name, _, kind, per_row, stacked), tensor in zip(op.inputs, tensors):
        if tensor is not None and kind != OTHER:
            dtypes, expected = _DTYPES[kind]
            if tensor.dtype not in dtypes:
                _refuse_dtype(op.name, name, tensor, expected)
            by_row = per_row is True or per_row in per_row_too
            wanted = (3,) if kind == MOMENTS else rows if by_row else shape
            wanted = (rows[0] + 1,) if kind == OFFSETS else wanted
            wanted = (stacked, *wanted) if stacked else wanted
            if tensor.shape != wanted:
                check_shape(op.name, name, tensor.shape, wanted)
            if tensor.device != device:
                check_device(op.name, name, tensor, device)
            tensor = tensor.contiguous()
        checked.append(tensor)
    return checked


def _check_rows(
    op: Op, tensors: tuple, per_row_too: Collection[str] = ()
) -> tuple[tuple[int, int], list]:
    """How many rows of tokens, and tokens in each, or with offsets in all of them, and what
    :func:`_checked` gives."""
    shape, offsets = tensors[0].shape, _lists.offsets_among(op, tensors)
    rows = _lists.rows_of(op, shape, None if offsets is None else offsets.shape)
    checked = _checked(op, tensors, rows=rows, per_row_too=per_row_too)
    return (torch.Size(rows).numel(), shape[-1]), checked


# --- Logits ---


def _check_logits(op: str, name: str, logits: Tensor) -> None:
    if logits.dtype not in _LOGITS:
        _refuse_dtype(op, name, logits, "float32, float16 or bfloat16")
    if logits.dim() == 0:
        check_rows(op, name, logits.shape, "vocab")


def _sliced(*logits: Tensor) -> tuple[int, Sequence[Tensor]]:
    """In how many slices logits are contiguous, and those logits, or copies if they never are."""
    for tensor in logits:
        if not tensor.is_contiguous():
            break
    else:
        return 1, logits
    first = logits[0]
    if first.dim() > 2 and first.numel() and all(each[0].is_contiguous() for each in logits):
        return len(first), logits
    return 1, [each.contiguous() for each in logits]


# --- logprob ---


def check_ids(op: str, index: Tensor) -> None:
    if index.dtype not in _TARGETS:
        _refuse_dtype(op, "index", index, "int64 or int32")


def check_offsets(op: str, offsets: Tensor, device: torch.device) -> None:
    dtypes, expected = _DTYPES[OFFSETS]
    if offsets.dtype not in dtypes:
        _refuse_dtype(op, "offsets", offsets, expected)
    check_device(op, "offsets", offsets, device)


def check_logprob(op: str, logits: Tensor, index: Tensor, several: bool = False) -> None:
    """With several tokens a row ``index`` has a dimension more."""
    _check_logits(op, "logits", logits)
    check_ids(op, index)
    shape, expected = index.shape, logits.shape[:-1]
    expected = (*expected, *shape[-1:]) if several else expected
    if shape != expected:
        check_shape(op, "index", shape, expected)
    if index.device != logits.device:
        check_device(op, "index", index, logits.device)


def _call_logprob(
    function: Pass,
    options: tuple,
    logits: Tensor,
    index: Tensor,
    stats: Tensor,
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
) -> None:
    temperature, ignore_index = options
    if temperature == 1.0 and ignore_index is None:
        options = ()
    elif ignore_index is not None and index.dtype is torch.int32:
        # The library reads int32 as uint32: the same bits.
        options = (temperature, ignore_index & 0xFFFF_FFFF)
    slices, (logits,) = (1, (logits,)) if logits.is_contiguous() else _sliced(logits)
    inputs = (logits, index.contiguous(), *inputs)
    total = index.numel()
    rows = total // slices
    sizes = (rows, logits.shape[-1], _LOGITS[logits.dtype], _TARGETS[index.dtype])
    # Of the backward pass: all columns.
    tile = (0, 0) if function is _lists.logprob_backward else ()
    for number in range(slices):
        kept = stats.data_ptr() + 4 * rows * number
        addresses = _addresses(inputs, results, number)
        _call(function, logits, options, *sizes, kept, kept + 4 * total, *tile, *addresses)


def _logprob_forward(op: Op, tensors: tuple, options: tuple) -> Results:
    logits, index = tensors
    check_logprob(op.name, logits, index)
    f32, with_entropy = torch.float32, op is _lists.LOGPROB_ENTROPY
    logp = torch.empty_like(index, dtype=f32, memory_format=torch.contiguous_format)
    entropy = torch.empty_like(logp) if with_entropy else None
    stats = torch.empty(2, *index.shape, dtype=f32, device=logits.device)
    yield (logp, entropy, stats) if with_entropy else (logp, stats)
    results = (entropy, logp)
    _call_logprob(_lists.logprob_forward, options, logits, index, stats, (), results)


def _backward_of_logprob(ctx: Any, grad_logp: Tensor | None, *rest: Tensor | None) -> tuple:
    logits, index, *entropy, stats = ctx.saved_tensors
    gradients = (entropy[0] if entropy else None, grad_logp, rest[0])
    return (call(logprob_backward, logits, index, stats, *gradients, *ctx.options),)


@_op(_lists.LOGPROB, "logp stats", _backward_of_logprob)
def logprob(*arguments: tuple) -> Results:
    return _logprob_forward(_lists.LOGPROB, *arguments)


@_op(_lists.LOGPROB_ENTROPY, "logp entropy stats", _backward_of_logprob, differentiable=2)
def logprob_entropy(*arguments: tuple) -> Results:
    return _logprob_forward(_lists.LOGPROB_ENTROPY, *arguments)


def _logprob_backward(grad_logits: Tensor | None, tensors: tuple, options: tuple) -> Results:
    check_logprob(_lists.LOGPROB_BACKWARD.name, *tensors[:2])
    logits, index, stats, *rest = _checked(_lists.LOGPROB_BACKWARD, tensors)
    grad_logits = _result(logits) if grad_logits is None else grad_logits
    yield grad_logits
    results = (grad_logits,)
    _call_logprob(_lists.logprob_backward, options, logits, index, stats, rest, results)


@_op(_lists.LOGPROB_BACKWARD)
def logprob_backward(*arguments: tuple) -> Results:
    return _logprob_backward(None, *arguments)


# --- logprob of several tokens a row ---


def _places(index: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Ids that can be looked up, and where there were others, which is an error on the CPU."""
    index = index.long()
    outside = (index < 0) | (index >= vocab)
    if index.is_cpu and outside.any():
        row, column = outside.reshape(-1, index.shape[-1]).nonzero()[0].tolist()
        found = f"`index`[{row}, {column}] is {index[outside][0]}"
        raise ValueError(f"selective_log_softmax: {found}, expected 0..{vocab}")
    return index.clamp(0, vocab - 1), outside


def _one_of(places: Tensor) -> Tensor:
    """Some token of each row."""
    return places[..., 0] if places.shape[-1] else places.new_zeros(places.shape[:-1])


def _at_places(
    logits: Tensor, places: Tensor, temperature: float, stats: Tensor, out: Tensor | None = None
) -> Tensor:
    largest, log_sum = stats.unsqueeze(-1)
    scaled = (logits.gather(-1, places).float() - largest) / temperature
    return torch.sub(scaled, log_sum, out=out)


def _backward_of_logprobs(ctx: Any, grad_logp: Tensor, _: None) -> tuple:
    return (call(logprobs_backward, *ctx.saved_tensors, grad_logp, *ctx.options),)


@_op(_lists.LOGPROBS, "logp stats", _backward_of_logprobs)
def logprobs(tensors: tuple, options: tuple) -> Results:
    """One pass over the logits for the normaliser of each row, then K numbers of each row."""
    (logits, index), (temperature,) = tensors, options
    check_logprob(_lists.LOGPROBS.name, logits, index, several=True)
    f32, rows = torch.float32, logits.shape[:-1]
    logp = torch.empty_like(index, dtype=f32, memory_format=torch.contiguous_format)
    stats = torch.empty(2, *rows, dtype=f32, device=logits.device)
    yield logp, stats
    places, outside = _places(index, logits.shape[-1])
    one = _one_of(places)
    of_one = torch.empty_like(one, dtype=f32, memory_format=torch.contiguous_format)
    options, results = (temperature, None), (None, of_one)
    _call_logprob(_lists.logprob_forward, options, logits, one, stats, (), results)
    _at_places(logits, places, temperature, stats, logp).masked_fill_(outside, torch.nan)


@_op(_lists.LOGPROBS_BACKWARD)
def logprobs_backward(tensors: tuple, options: tuple) -> Results:
    """With G the sum of a row's upstream gradients, -G p_j / T everywhere, and the sum of those of
    token j on top of it where j is chosen. The chosen ones are formed in single precision. A row
    with a gradient for an id outside of the vocabulary is NaN, as with one token a row."""
    (logits, index, stats, grad), (temperature,) = tensors, options
    grad_logits = _result(logits)
    yield grad_logits
    places, outside = _places(index, logits.shape[-1])
    nowhere = (outside & (grad != 0)).any(-1)
    total = grad.sum(-1).masked_fill_(nowhere, torch.nan)
    of_one = (logits, _one_of(places), stats, None, total, None)
    list(_logprob_backward(grad_logits, of_one, (temperature, None)))
    same = places.unsqueeze(-1) == places.unsqueeze(-2)
    of_token = torch.where(same, grad.unsqueeze(-2), 0.0).sum(-1)
    # What is not in the vocabulary has another's place: all that is written there is the same.
    p = _at_places(logits, places, temperature, stats).exp()
    chosen = (of_token - total.unsqueeze(-1) * p) / temperature
    grad_logits.scatter_(-1, places, chosen.to(grad_logits.dtype))


# --- kl ---


def _backward_of_kl(ctx: Any, grad_kl: Tensor, *_: None) -> list[Tensor | None]:
    """Of either op, one of which has kept statistics too."""
    saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:3]  # the first input is not the op's
    backward = full_kl_backward if len(saved) > 3 else token_kl_backward
    gradients = call(backward, *saved, grad_kl, *wanted, *ctx.options)
    return [gradient if want else None for gradient, want in zip(gradients, wanted)]


@_op(_lists.TOKEN_KL, backward=_backward_of_kl)
def token_kl(tensors: tuple, options: tuple) -> Results:
    inputs, kl = _checked(_lists.TOKEN_KL, tensors), _result(tensors[0])
    yield kl
    _call(_lists.token_kl_forward, kl, options, kl.numel(), *_addresses(inputs, (kl,)))


@_op(_lists.TOKEN_KL_BACKWARD, "grad_logp grad_ref_logp", wants="logp ref")
def token_kl_backward(tensors: tuple, options: tuple) -> Results:
    inputs = _checked(_lists.TOKEN_KL_BACKWARD, tensors)
    wanted, options = options[:2], options[2:]
    gradients = tuple(_result(tensors[0], want) for want in wanted)
    yield gradients
    addresses = _addresses(inputs, gradients)
    _call(_lists.token_kl_backward, inputs[0], options, inputs[0].numel(), *addresses)


def _check_full_kl(op: Op, tensors: tuple) -> list[Tensor | None]:
    logits, ref_logits, *_ = tensors
    _check_logits(op.name, "logits", logits)
    if ref_logits.dtype is not logits.dtype:
        _refuse_dtype(op.name, "ref_logits", ref_logits, logits.dtype)
    check_shape(op.name, "ref_logits", ref_logits.shape, logits.shape)
    check_device(op.name, "ref_logits", ref_logits, logits.device)
    return _checked(op, tensors)


@_op(_lists.FULL_KL, "kl stats", _backward_of_kl)
def full_kl(tensors: tuple, options: tuple) -> Results:
    *logits, mask = _check_full_kl(_lists.FULL_KL, tensors)
    kl = logits[0].new_empty(logits[0].shape[:-1], dtype=torch.float32)
    stats = kl.new_empty((_header.KL_FULL_STATS, *kl.shape))
    yield kl, stats
    slices, logits = _sliced(*logits)
    sizes = (kl.numel() // slices, logits[0].shape[-1], _LOGITS[logits[0].dtype])
    for number in range(slices):
        buffer = stats if slices == 1 else torch.empty_like(stats[:, number])
        addresses = _addresses((*logits, mask), number=number)
        _call(_lists.full_kl_forward, kl, options, *sizes, buffer.data_ptr(), *addresses)
        if buffer is not stats:
            stats[:, number] = buffer
    kl.copy_(stats[0])


@_op(_lists.FULL_KL_BACKWARD, "grad_logits grad_ref_logits", wants="logits ref")
def full_kl_backward(tensors: tuple, options: tuple) -> Results:
    *logits, mask, stats, grad_kl = _check_full_kl(_lists.FULL_KL_BACKWARD, tensors)
    wanted, options = options[:2], options[2:]
    gradients = tuple(_result(logits[0], want) for want in wanted)
    yield gradients
    slices, logits = _sliced(*logits)
    sizes = (stats[0].numel() // slices, logits[0].shape[-1], _LOGITS[logits[0].dtype])
    for number in range(slices):
        kept = stats if slices == 1 else stats[:, number].contiguous()
        addresses = _addresses((*logits, mask, grad_kl), gradients, number)
        _call(_lists.full_kl_backward, stats, options, *sizes, kept.data_ptr(), *addresses)


# --- gae ---


def _moments_like(values: Tensor) -> Tensor:
    return torch.empty(3, dtype=torch.float64, device=values.device)


@_op(_lists.GAE, "advantages returns rewards moments", wants="rewards")
def gae(tensors: tuple, options: tuple) -> Results:
    sizes, inputs = _check_rows(_lists.GAE, tensors)
    with_rewards, *options = options
    of_tokens = (_result(tensors[0], want) for want in (True, True, with_rewards))
    outputs = (*of_tokens, _moments_like(tensors[0]))
    yield outputs
    _call(_lists.gae, inputs[0], options, *sizes, *_addresses(inputs, outputs))


# --- advantages ---


@_op(_lists.ADVANTAGES, "advantages token_advantages stats", size="group_size")
def outcome_advantages(given: tuple, options: tuple) -> Results:
    *tensors, group_size = given
    scores, *_, mask, offsets = tensors
    shapes = (None if tensor is None else tensor.shape for tensor in (mask, offsets))
    shape = _lists.tokens_of(scores.shape, *shapes)
    inputs = _checked(_lists.ADVANTAGES, tuple(tensors), shape=shape, rows=scores.shape)
    stats = torch.empty(len(_lib.ADVANTAGE_STATS), dtype=torch.float64, device=scores.device)
    outputs = (_result(scores), _result(scores, mask is not None, shape), stats)
    yield outputs
    sizes = (scores.numel(), shape[-1], group_size)
    _call(_lists.advantages, scores, options, *sizes, *_addresses(inputs, outputs))


@_op(_lists.TOKEN_BASELINE, "advantages returns", size="group_size")
def optimal_token_baseline(given: tuple, options: tuple) -> Results:
    *tensors, group_size = given
    sizes, inputs = _check_rows(_lists.TOKEN_BASELINE, tuple(tensors))
    outputs = (_result(tensors[0]), _result(tensors[0]))
    yield outputs
    addresses = _addresses(inputs, outputs)
    _call(_lists.optimal_token_baseline, inputs[0], options, *sizes, group_size, *addresses)


# --- whiten ---


@_op(_lists.MASKED_MOMENTS)
def masked_moments(tensors: tuple, _: tuple) -> Results:
    inputs, moments = _checked(_lists.MASKED_MOMENTS, tensors), _moments_like(tensors[0])
    yield moments
    _call(_lists.whiten_moments, moments, (), inputs[0].numel(), *_addresses(inputs, (moments,)))


def _backward_of_whiten(ctx: Any, grad: Tensor, _: None) -> tuple:
    values, mask, moments = ctx.saved_tensors
    return (call(masked_whiten_backward, grad, mask, moments, values, *ctx.options),)


def _backward_of_whiten_with(ctx: Any, grad: Tensor) -> tuple:
    _, mask, moments = ctx.saved_tensors  # the moments are constants
    return (call(masked_whiten_backward, grad, mask, moments, None, *ctx.options),)


@_op(_lists.MASKED_WHITEN, "whitened moments", _backward_of_whiten)
def masked_whiten(tensors: tuple, options: tuple) -> Results:
    inputs = _checked(_lists.MASKED_WHITEN, tensors)
    whitened, moments = _result(tensors[0]), _moments_like(tensors[0])
    yield whitened, moments
    given = (whitened.numel(), *_addresses((*inputs, moments)))
    _call(_lists.whiten_moments, moments, (), *given)
    counted = "values" if inputs[1] is None else "mask"
    given = (*given, whitened.data_ptr())
    _call(_lists.whiten_forward, moments, options, *given, moments=counted)


@_op(_lists.MASKED_WHITEN_WITH, backward=_backward_of_whiten_with)
def masked_whiten_with(tensors: tuple, options: tuple) -> Results:
    inputs, whitened = _checked(_lists.MASKED_WHITEN_WITH, tensors), _result(tensors[0])
    yield whitened
    given = (whitened.numel(), *_addresses(inputs, (whitened,)))
    _call(_lists.whiten_forward, whitened, options, *given)


@_op(_lists.MASKED_WHITEN_BACKWARD)
def masked_whiten_backward(tensors: tuple, options: tuple) -> Results:
    """Through the moments too where the values are given."""
    *rest, values = _checked(_lists.MASKED_WHITEN_BACKWARD, tensors)
    grad_values = _result(tensors[0])
    yield grad_values
    given = (grad_values.numel(), *_addresses(rest, (grad_values,)))
    if values is None:
        _call(_lists.whiten_with_backward, grad_values, options, *given)
    else:
        _call(_lists.whiten_backward, grad_values, options, *given, values.data_ptr())


# --- correction ---


@_op(_lists.CORRECTION, "weights kept stats")
def correction(tensors: tuple, options: tuple) -> Results:
    sizes, inputs = _check_rows(_lists.CORRECTION, tensors)
    weights, device = _result(tensors[0]), tensors[0].device
    # The library writes bytes that are 0 or 1.
    kept = torch.empty_like(weights, dtype=torch.bool)
    stats = torch.empty(len(_lib.CORRECTION_STATS), dtype=torch.float64, device=device)
    outputs = (weights, kept, stats)
    yield outputs
    _call(_lists.correction, inputs[0], options, *sizes, *_addresses(inputs, outputs))


# --- ppo_loss ---


def _scaled(grad: Tensor, *stored: Tensor) -> Sequence[Tensor]:
    """Three stored gradients times that of the loss; those that are not there have no elements."""
    # After loss.backward() the stored ones are what is wanted, unless they may be asked for again.
    # Looking costs nothing on the CPU.
    once = not _C._autograd._get_current_graph_task_keep_graph()
    as_stored = once and type(grad) is Tensor and grad.is_cpu and grad.item() == 1.0
    return stored if as_stored else ppo_loss_backward(grad, *stored)


def _backward_of_ppo_loss(ctx: Any, grad: Tensor, *_: None) -> list[Tensor | None]:
    gradients = dict(zip(_lists.PPO_LOSS_GRADIENTS, _scaled(grad, *ctx.saved_tensors[-3:])))
    # What else asks for a gradient, old_logp say, is a constant.
    needs = zip(_lists.PPO_LOSS.inputs, ctx.needs_input_grad[1:])
    return [gradients.get(argument.name) if needed else None for argument, needed in needs]


_STORED = " ".join(f"grad_{name}" for name in _lists.PPO_LOSS_GRADIENTS)
_WANTS = " ".join(_lists.PPO_LOSS_GRADIENTS)
_NAMES = [argument.name for argument in _lists.PPO_LOSS.inputs]
_KEPT = [_NAMES.index(name) for name in _lists.PPO_LOSS_GRADIENTS]
_PER_ROW = [
    (name, list(_lists.PPO_LOSS.options.kinds).index(name)) for name in _lists.PPO_LOSS_PER_ROW
]


@_op(_lists.PPO_LOSS, f"loss stats {_STORED}", _backward_of_ppo_loss, _WANTS, kept=_KEPT)
def ppo_loss(tensors: tuple, options: tuple) -> Results:
    wanted, options = options[:3], options[3:]
    per_row = [name for name, place in _PER_ROW if options[place]]
    sizes, inputs = _check_rows(_lists.PPO_LOSS, tensors, per_row)
    f32, device = torch.float32, tensors[0].device
    loss = torch.empty((), dtype=f32, device=device)
    stats = torch.empty(len(_lib.STATS), dtype=f32, device=device)
    gradients = [_result(tensors[0], want) for want in wanted]
    yield loss, stats, *gradients
    exact = torch.empty_like(stats, dtype=torch.float64)
    addresses = _addresses(inputs, (exact, loss, *gradients))
    _call(_lists.ppo_loss, exact, options, *sizes, *addresses)
    stats.copy_(exact)


@_op(_lists.PPO_LOSS_BACKWARD, _STORED)
def ppo_loss_backward(tensors: tuple, _: tuple) -> Results:
    _, *stored = tensors
    grad = _checked(_lists.PPO_LOSS_BACKWARD, tensors[:1], stored[0], ())
    gradients = tuple(map(_result, stored))
    yield gradients
    tokens = max(gradient.numel() for gradient in stored)
    # What is not wanted is not stored either.
    addresses = _addresses(grad, (*stored, *gradients))
    _call(_lists.ppo_loss_scale, stored[0], (), tokens, *addresses)


# --- preference ---


def _backward_of_preference(ctx: Any, grad: Tensor, *_: None) -> tuple:
    _, stored = ctx.saved_tensors
    nothing = stored.new_empty(0)
    return (_scaled(grad, stored, nothing, nothing)[0],)


def _of_preference(like: Tensor, units: int, rows: int) -> tuple[Tensor, ...]:
    """Buffers of the loss, of its statistics, and of losses and rewards."""
    f32, device = torch.float32, like.device
    sizes = ((), (len(_lib.PREFERENCE_STATS),), (units,), (rows,))
    return tuple(torch.empty(size, dtype=f32, device=device) for size in sizes)


@_op(
    _lists.PREFERENCE,
    "loss grad_logp stats losses rewards",
    _backward_of_preference,
    "logp",
    kept=(0,),
    saved=1,
)
def preference_loss(tensors: tuple, options: tuple) -> Results:
    logp, (wanted, *options) = tensors[0], options
    offsets = tensors[-1]
    found = _lists.responses(logp.shape, None if offsets is None else offsets.shape)
    (rows, seq_len), shape = found
    units = _lists.units_of(rows, options)
    inputs = _checked(_lists.PREFERENCE_LOGP, tensors[:1])
    inputs += _checked(_lists.PREFERENCE_ROWS, tensors[1:6], logp, shape, (rows,))
    inputs += _checked(_lists.PREFERENCE_UNITS, tensors[6:8], logp, (units,))
    inputs += _checked(_lists.PREFERENCE_KL, tensors[8:9], logp, (1,))
    if offsets is not None:
        (offsets,) = _checked(_lists.PREFERENCE_OFFSETS, tensors[9:], logp, shape, (rows,))
    inputs.append(offsets)
    grad_logp = _result(logp, wanted)
    loss, stats, losses, rewards = _of_preference(logp, units, rows)
    yield loss, grad_logp, stats, losses, rewards
    exact = torch.empty_like(stats, dtype=torch.float64)
    addresses = _addresses(inputs, (exact, loss, losses, rewards, grad_logp))
    _call(_lists.preference_loss, exact, options, rows, seq_len, *addresses)
    stats.copy_(exact)


@_op(
    _lists.REWARD_MODEL,
    "loss grad_rewards stats losses",
    _backward_of_preference,
    "rewards",
    kept=(0,),
    saved=1,
)
def reward_model_loss(tensors: tuple, options: tuple) -> Results:
    rewards, (wanted, *options) = tensors[0], options
    _lists.check_rewards(rewards.shape)
    pairs = rewards.shape[1]
    inputs = _checked(_lists.REWARD_MODEL_REWARDS, tensors)
    inputs += _checked(_lists.REWARD_MODEL_PAIRS, tensors[1:], rewards, (pairs,))
    grad_rewards = _result(rewards, wanted)
    loss, stats, losses, _ = _of_preference(rewards, pairs, 0)
    yield loss, grad_rewards, stats, losses
    exact = torch.empty_like(stats, dtype=torch.float64)
    addresses = _addresses(inputs, (exact, loss, losses, grad_rewards))
    _call(_lists.reward_model_loss, exact, options, pairs, *addresses)
    stats.copy_(exact)
