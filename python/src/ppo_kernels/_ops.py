"""The ops of ``torch.ops.ppo_kernels``, for CPU and CUDA, with fake implementations and gradients.

``functional`` is what to call; this module is how it is done. For each op there is its schema, a
function that allocates the outputs and calls the C library, a fake one that only allocates, and
for the differentiable ones what to keep and how to go backwards. Gradients of gradients are
refused.

Tensors are taken as they are when they are contiguous, and copied when they are not; of logits
whose leading slices are contiguous, such as ``logits[:, :-1]``, each slice goes to the library on
its own, without a copy.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from ctypes import byref, c_size_t
from typing import Any

import torch
from torch import _C, Tensor

from . import _lib
from ._lib import library

_LOGITS = {getattr(torch, name): code for name, code in _lib.LOGITS.items()}
_TARGETS = {getattr(torch, name): code for name, code in _lib.TARGETS.items()}
BYTES = (torch.bool, torch.uint8, torch.int8)

_ops = torch.library.Library("ppo_kernels", "DEF")


# --- How an op is made ---


def _define(schema: str, implementation: Callable, fake: Callable) -> Any:
    name = schema[: schema.index("(")]
    _ops.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _ops.impl(name, implementation, "CPU")
    _ops.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"ppo_kernels::{name}", fake, lib=_ops)
    return getattr(torch.ops.ppo_kernels, name).default


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


def _differentiate(op: Any, implementation: Callable, keep: Callable, backward: Callable) -> None:
    """Gives an op its gradient: ``keep(ctx, inputs, outputs)`` and ``backward(ctx, *gradients)``.

    It does what ``torch.library.register_autograd`` does, with less to do for each call: where the
    dispatcher would go on to our own implementation, that is called at once.
    """
    name = op.__name__.removesuffix(".default")

    def below(keys: Any, inputs: tuple) -> Any:
        keys &= _C._after_autograd_keyset
        if keys.highestPriorityTypeId() in _BACKENDS:
            return implementation(*inputs)
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keys, *inputs)

    def forward(ctx: Any, keys: Any, *inputs: Any) -> Any:
        outputs = below(keys, inputs)
        ctx.set_materialize_grads(False)
        keep(ctx, inputs, outputs)
        return outputs

    def gradient(ctx: Any, *upstream: Tensor | None) -> tuple:
        if not _C.is_grad_enabled():
            return None, *backward(ctx, *upstream)
        with torch.no_grad():
            found = backward(ctx, *upstream)
        return None, *(grad if grad is None else _Once.once(grad) for grad in found)

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    function = type(f"ppo_kernels_{name}", (torch.autograd.Function,), members)

    def autograd(keys: Any, *inputs: Any) -> Any:
        if _C.is_grad_enabled() and _C._any_requires_grad(*inputs):
            return function.apply(keys, *inputs)
        return below(keys, inputs)

    _ops.impl(name, autograd, "Autograd", with_keyset=True)


def _call(function: str, like: Tensor, sizes: tuple[int, ...], *arguments: Any) -> None:
    """Calls the library for a tensor's device; ``sizes``: what the workspace on CUDA depends on."""
    if like.is_cpu:
        status = getattr(library, function + "_cpu")(*arguments)
    elif like.get_device() == torch.cuda.current_device():
        status = _call_cuda(function, like.device, sizes, arguments)
    else:
        with torch.cuda.device(like.device):
            status = _call_cuda(function, like.device, sizes, arguments)
    if status:
        _lib.fail(status)


def _call_cuda(function: str, device: torch.device, sizes: tuple, arguments: tuple) -> int:
    stream = torch.cuda.current_stream(device).cuda_stream
    size = c_size_t()
    status = getattr(library, function + "_cuda_workspace_size")(*sizes, stream, byref(size))
    if status:
        return status
    workspace = torch.empty(size.value, dtype=torch.uint8, device=device)
    address = workspace.data_ptr()
    return getattr(library, function + "_cuda")(*arguments, address, size.value, stream)


# --- Room for results ---

# From this size on glibc gives every allocation a mapping of its own.
_OWN_MAPPING = 32 << 20
_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _large_pages(*results: Tensor) -> tuple[Tensor, ...]:
    """Room for results, as it is.

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


def _f32(op: str, name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    if tensor.dtype is not torch.float32:
        _refuse_dtype(op, name, tensor, "float32")
    check_shape(op, name, tensor, shape)
    check_device(op, name, tensor, device)
    return tensor.contiguous()


def _mask(op: str, name: str, mask: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    if mask.dtype not in BYTES:
        _refuse_dtype(op, name, mask, "bool or uint8")
    check_shape(op, name, mask, shape)
    check_device(op, name, mask, device)
    return mask.contiguous()


def _optional(check: Callable, op: str, name: str, tensor: Tensor | None, *rest: Any) -> Any:
    return None if tensor is None else check(op, name, tensor, *rest)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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


def _logprob_options(index: Tensor, temperature: float, ignore_index: int | None) -> Any:
    if temperature == 1.0 and ignore_index is None:
        return None
    if ignore_index is not None and index.dtype is torch.int32:
        ignore_index &= 0xFFFF_FFFF  # the library reads int32 as uint32: the same bits
    return byref(_lib.logprob_options(temperature, ignore_index))


def _logprob_outputs(op: str, logits: Tensor, index: Tensor) -> tuple[int, int, Tensor, Tensor]:
    """Types of the arguments, once they are checked; room for one number a row, and for the two
    that the backward pass needs."""
    types = check_logprob(op, logits, index)
    f32 = torch.float32
    logp = torch.empty_like(index, dtype=f32, memory_format=torch.contiguous_format)
    return *types, logp, torch.empty(2, *index.shape, dtype=f32, device=logits.device)


def _logprob_forward(
    op: str,
    logits: Tensor,
    index: Tensor,
    temperature: float,
    ignore_index: int | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    logits_type, index_type, logp, stats = _logprob_outputs(op, logits, index)
    entropy = torch.empty_like(logp) if with_entropy else None
    options = _logprob_options(index, temperature, ignore_index)
    index = index.contiguous()
    total, vocab = index.numel(), logits.shape[-1]
    size = index.element_size()
    for (part,), first, rows in _blocks(total, logits):
        _call(
            "logprob_forward",
            logits,
            (logits_type, rows, vocab),
            part.data_ptr(),
            logits_type,
            index.data_ptr() + first * size,
            index_type,
            rows,
            vocab,
            options,
            logp.data_ptr() + 4 * first,
            None if entropy is None else entropy.data_ptr() + 4 * first,
            stats.data_ptr() + 4 * first,
            stats.data_ptr() + 4 * (total + first),
        )
    return logp, entropy, stats


def _logprob(
    logits: Tensor, index: Tensor, temperature: float, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    op = "selective_log_softmax"
    logp, _, stats = _logprob_forward(op, logits, index, temperature, ignore_index, False)
    return logp, stats


def _logprob_fake(
    logits: Tensor, index: Tensor, temperature: float, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    return _logprob_outputs("selective_log_softmax", logits, index)[2:]


def _logprob_entropy(
    logits: Tensor, index: Tensor, temperature: float, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    op = "logprobs_and_entropy"
    return _logprob_forward(op, logits, index, temperature, ignore_index, True)


def _logprob_entropy_fake(
    logits: Tensor, index: Tensor, temperature: float, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, logp, stats = _logprob_outputs("logprobs_and_entropy", logits, index)
    return logp, torch.empty_like(logp), stats


def _logprob_backward(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    ignore_index: int | None,
    stats: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    op, device = "logprob_backward", logits.device
    logits_type, index_type = check_logprob(op, logits, index)
    options = _logprob_options(index, temperature, ignore_index)
    index = index.contiguous()
    stats = _f32(op, "stats", stats, torch.Size((2, *index.shape)), device)
    rows_of = (index.shape, device)
    entropy = _optional(_f32, op, "entropy", entropy, *rows_of)
    grad_logp = _optional(_f32, op, "grad_logp", grad_logp, *rows_of)
    grad_entropy = _optional(_f32, op, "grad_entropy", grad_entropy, *rows_of)
    (grad_logits,) = _large_pages(_room_like_logits(logits))
    total, vocab = index.numel(), logits.shape[-1]
    size, row_bytes = index.element_size(), vocab * logits.element_size()
    for (part,), first, rows in _blocks(total, logits):
        _call(
            "logprob_backward",
            logits,
            (logits_type, rows, vocab),
            part.data_ptr(),
            logits_type,
            index.data_ptr() + first * size,
            index_type,
            rows,
            vocab,
            options,
            stats.data_ptr() + 4 * first,
            stats.data_ptr() + 4 * (total + first),
            None if entropy is None else entropy.data_ptr() + 4 * first,
            None if grad_logp is None else grad_logp.data_ptr() + 4 * first,
            None if grad_entropy is None else grad_entropy.data_ptr() + 4 * first,
            grad_logits.data_ptr() + first * row_bytes,
        )
    return grad_logits


def _room_like_logits(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


logprob = _define(
    "logprob(Tensor logits, Tensor index, float temperature, int? ignore_index)"
    " -> (Tensor logp, Tensor stats)",
    _logprob,
    _logprob_fake,
)
logprob_entropy = _define(
    "logprob_entropy(Tensor logits, Tensor index, float temperature, int? ignore_index)"
    " -> (Tensor logp, Tensor entropy, Tensor stats)",
    _logprob_entropy,
    _logprob_entropy_fake,
)
logprob_backward = _define(
    "logprob_backward(Tensor logits, Tensor index, float temperature, int? ignore_index,"
    " Tensor stats, Tensor? entropy, Tensor? grad_logp, Tensor? grad_entropy) -> Tensor",
    _logprob_backward,
    _room_like_logits,
)


def _keep_logprob(ctx: Any, inputs: tuple, outputs: tuple) -> None:
    logits, index, ctx.temperature, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, index, outputs[1])
    ctx.mark_non_differentiable(outputs[1])


def _backward_of_logprob(ctx: Any, grad_logp: Tensor | None, _: None) -> tuple:
    if grad_logp is None:
        return None, None, None, None
    logits, index, stats = ctx.saved_tensors
    grad = logprob_backward(
        logits, index, ctx.temperature, ctx.ignore_index, stats, None, grad_logp, None
    )
    return grad, None, None, None


def _keep_logprob_entropy(ctx: Any, inputs: tuple, outputs: tuple) -> None:
    logits, index, ctx.temperature, ctx.ignore_index = inputs
    _, entropy, stats = outputs
    ctx.save_for_backward(logits, index, entropy, stats)
    ctx.mark_non_differentiable(stats)


def _backward_of_logprob_entropy(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: None
) -> tuple:
    if grad_logp is None and grad_entropy is None:
        return None, None, None, None
    logits, index, entropy, stats = ctx.saved_tensors
    grad = logprob_backward(
        logits, index, ctx.temperature, ctx.ignore_index, stats, entropy, grad_logp, grad_entropy
    )
    return grad, None, None, None


_differentiate(logprob, _logprob, _keep_logprob, _backward_of_logprob)
_differentiate(
    logprob_entropy, _logprob_entropy, _keep_logprob_entropy, _backward_of_logprob_entropy
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
    _, stats = _logprob(logits, _one_of(places), temperature, None)
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
    grad_logits = _logprob_backward(
        logits, _one_of(places), temperature, None, stats, None, total, None
    )
    same = places.unsqueeze(-1) == places.unsqueeze(-2)
    of_token = torch.where(same, grad.unsqueeze(-2), 0.0).sum(-1)
    # What is not in the vocabulary has another's place: all that is written there is the same.
    p = _at_places(logits, places, temperature, stats).exp()
    chosen = (of_token - total.unsqueeze(-1) * p) / temperature
    return grad_logits.scatter_(-1, places, chosen.to(grad_logits.dtype))


logprobs = _define(
    "logprobs(Tensor logits, Tensor index, float temperature) -> (Tensor logp, Tensor stats)",
    _logprobs,
    _logprobs_fake,
)
logprobs_backward = _define(
    "logprobs_backward(Tensor logits, Tensor index, float temperature, Tensor stats,"
    " Tensor grad_logp) -> Tensor",
    _logprobs_backward,
    _room_like_logits,
)


def _keep_logprobs(ctx: Any, inputs: tuple, outputs: tuple) -> None:
    logits, index, ctx.temperature = inputs
    _, stats = outputs
    ctx.save_for_backward(logits, index, stats)
    ctx.mark_non_differentiable(stats)


def _backward_of_logprobs(ctx: Any, grad_logp: Tensor | None, _: None) -> tuple:
    if grad_logp is None:
        return None, None, None
    logits, index, stats = ctx.saved_tensors
    grad = logprobs_backward(logits, index, ctx.temperature, stats, grad_logp)
    return grad, None, None


_differentiate(logprobs, _logprobs, _keep_logprobs, _backward_of_logprobs)


# --- kl ---


def _check_token_kl(
    op: str, logp: Tensor, ref_logp: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    like = (logp.shape, logp.device)
    logp = _f32(op, "logp", logp, *like)
    return logp, _f32(op, "ref_logp", ref_logp, *like), _optional(_mask, op, "mask", mask, *like)


def _token_kl(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None,
    estimator: str,
    log_ratio_clamp: float | None,
    output_clamp: float | None,
) -> Tensor:
    logp, ref_logp, mask = _check_token_kl("token_kl", logp, ref_logp, mask)
    (kl,) = _large_pages(torch.empty_like(logp))
    _call(
        "kl_token_forward",
        logp,
        (logp.numel(),),
        logp.data_ptr(),
        ref_logp.data_ptr(),
        _pointer(mask),
        logp.numel(),
        byref(_lib.kl_token_options(estimator, log_ratio_clamp, output_clamp)),
        kl.data_ptr(),
    )
    return kl


def _token_kl_fake(logp: Tensor, ref_logp: Tensor, mask: Tensor | None, *_: Any) -> Tensor:
    return torch.empty_like(_check_token_kl("token_kl", logp, ref_logp, mask)[0])


def _wanted(like: Tensor, wanted: bool) -> Tensor:
    """Room for a gradient, or a tensor of no elements if it is not wanted."""
    if wanted:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty(0, dtype=like.dtype, device=like.device)


def _pointer_if(tensor: Tensor, wanted: bool) -> int | None:
    return tensor.data_ptr() if wanted else None


def _token_kl_backward(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None,
    estimator: str,
    log_ratio_clamp: float | None,
    output_clamp: float | None,
    grad_kl: Tensor,
    want_logp: bool,
    want_ref: bool,
) -> tuple[Tensor, Tensor]:
    op = "token_kl_backward"
    logp, ref_logp, mask = _check_token_kl(op, logp, ref_logp, mask)
    grad_kl = _f32(op, "grad_kl", grad_kl, logp.shape, logp.device)
    grad_logp, grad_ref = _large_pages(_wanted(logp, want_logp), _wanted(logp, want_ref))
    _call(
        "kl_token_backward",
        logp,
        (logp.numel(),),
        logp.data_ptr(),
        ref_logp.data_ptr(),
        _pointer(mask),
        logp.numel(),
        byref(_lib.kl_token_options(estimator, log_ratio_clamp, output_clamp)),
        grad_kl.data_ptr(),
        _pointer_if(grad_logp, want_logp),
        _pointer_if(grad_ref, want_ref),
    )
    return grad_logp, grad_ref


def _two_gradients_fake(like: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    want, want_ref = rest[-2:]
    return _wanted(like, want), _wanted(like, want_ref)


token_kl = _define(
    "token_kl(Tensor logp, Tensor ref_logp, Tensor? mask, str estimator, float? log_ratio_clamp,"
    " float? output_clamp) -> Tensor",
    _token_kl,
    _token_kl_fake,
)
token_kl_backward = _define(
    "token_kl_backward(Tensor logp, Tensor ref_logp, Tensor? mask, str estimator,"
    " float? log_ratio_clamp, float? output_clamp, Tensor grad_kl, bool want_logp, bool want_ref)"
    " -> (Tensor grad_logp, Tensor grad_ref_logp)",
    _token_kl_backward,
    _two_gradients_fake,
)


def _keep_token_kl(ctx: Any, inputs: tuple, _: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _two(gradients: tuple[Tensor, Tensor], wanted: tuple[bool, bool]) -> Iterator[Tensor | None]:
    return (gradient if want else None for gradient, want in zip(gradients, wanted))


def _backward_of_token_kl(ctx: Any, grad_kl: Tensor | None) -> tuple:
    if grad_kl is None:
        return (None,) * 6
    wanted = ctx.needs_input_grad[1:3]  # the first input is not the op's
    gradients = token_kl_backward(*ctx.saved_tensors, *ctx.options, grad_kl, *wanted)
    return *_two(gradients, wanted), None, None, None, None


_differentiate(token_kl, _token_kl, _keep_token_kl, _backward_of_token_kl)


def _check_full_kl(
    op: str, logits: Tensor, ref_logits: Tensor, mask: Tensor | None
) -> tuple[int, Tensor | None]:
    logits_type = _logits_type(op, "logits", logits)
    if ref_logits.dtype is not logits.dtype:
        _refuse_dtype(op, "ref_logits", ref_logits, str(logits.dtype).removeprefix("torch."))
    check_shape(op, "ref_logits", ref_logits, logits.shape)
    check_device(op, "ref_logits", ref_logits, logits.device)
    rows = (logits.shape[:-1], logits.device)
    return logits_type, _optional(_mask, op, "mask", mask, *rows)


def _full_kl_outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    stats = logits.new_empty((_lib.FULL_KL_STATS, *rows), dtype=torch.float32)
    return logits.new_empty(rows, dtype=torch.float32), stats


def _full_kl_inputs(
    logits_type: int, logits: Tensor, ref_logits: Tensor, mask: Tensor | None
) -> Iterator[tuple[int, int, tuple[int, ...], tuple]]:
    """For each part its first row, its rows, what its workspace depends on, and what the library's
    functions begin with."""
    vocab = logits.shape[-1]
    for parts, first, rows in _blocks(logits.shape[:-1].numel(), logits, ref_logits):
        addresses = (part.data_ptr() for part in parts)
        of_mask = None if mask is None else mask.data_ptr() + first
        inputs = (*addresses, logits_type, of_mask, rows, vocab)
        yield first, rows, (logits_type, rows, vocab), inputs


def _stats_of(stats: Tensor, first: int, rows: int) -> Tensor:
    return stats.view(len(stats), -1)[:, first : first + rows]


def _full_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, direction: str, temperature: float
) -> tuple[Tensor, Tensor]:
    logits_type, mask = _check_full_kl("full_kl", logits, ref_logits, mask)
    kl, stats = _full_kl_outputs(logits)
    options = byref(_lib.kl_full_options(direction, temperature))
    for first, rows, sizes, inputs in _full_kl_inputs(logits_type, logits, ref_logits, mask):
        room = stats if rows == kl.numel() else stats.new_empty(len(stats), rows)
        _call("kl_full_forward", logits, sizes, *inputs, options, room.data_ptr())
        if room is not stats:
            _stats_of(stats, first, rows).copy_(room)
    return kl.copy_(stats[0]), stats


def _full_kl_fake(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    _check_full_kl("full_kl", logits, ref_logits, mask)
    return _full_kl_outputs(logits)


def _full_kl_backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    direction: str,
    temperature: float,
    stats: Tensor,
    grad_kl: Tensor,
    want_logits: bool,
    want_ref: bool,
) -> tuple[Tensor, Tensor]:
    op = "full_kl_backward"
    logits_type, mask = _check_full_kl(op, logits, ref_logits, mask)
    shape = logits.shape[:-1]
    stats_shape = torch.Size((_lib.FULL_KL_STATS, *shape))
    stats = _f32(op, "stats", stats, stats_shape, logits.device)
    grad_kl = _f32(op, "grad_kl", grad_kl, shape, logits.device)
    grad_logits, grad_ref = _large_pages(_wanted(logits, want_logits), _wanted(logits, want_ref))
    options = byref(_lib.kl_full_options(direction, temperature))
    row_bytes = logits.shape[-1] * logits.element_size()
    for first, rows, sizes, inputs in _full_kl_inputs(logits_type, logits, ref_logits, mask):
        part_stats = _stats_of(stats, first, rows).contiguous()
        _call(
            "kl_full_backward",
            logits,
            sizes,
            *inputs,
            options,
            part_stats.data_ptr(),
            grad_kl.data_ptr() + 4 * first,
            grad_logits.data_ptr() + first * row_bytes if want_logits else None,
            grad_ref.data_ptr() + first * row_bytes if want_ref else None,
        )
    return grad_logits, grad_ref


full_kl = _define(
    "full_kl(Tensor logits, Tensor ref_logits, Tensor? mask, str direction, float temperature)"
    " -> (Tensor kl, Tensor stats)",
    _full_kl,
    _full_kl_fake,
)
full_kl_backward = _define(
    "full_kl_backward(Tensor logits, Tensor ref_logits, Tensor? mask, str direction,"
    " float temperature, Tensor stats, Tensor grad_kl, bool want_logits, bool want_ref)"
    " -> (Tensor grad_logits, Tensor grad_ref_logits)",
    _full_kl_backward,
    _two_gradients_fake,
)


def _keep_full_kl(ctx: Any, inputs: tuple, outputs: tuple) -> None:
    stats = outputs[1]
    ctx.save_for_backward(*inputs[:3], stats)
    ctx.options = inputs[3:]
    ctx.mark_non_differentiable(stats)


def _backward_of_full_kl(ctx: Any, grad_kl: Tensor | None, _: None) -> tuple:
    if grad_kl is None:
        return (None,) * 5
    *inputs, stats = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1:3]
    gradients = full_kl_backward(*inputs, *ctx.options, stats, grad_kl, *wanted)
    return *_two(gradients, wanted), None, None, None


_differentiate(full_kl, _full_kl, _keep_full_kl, _backward_of_full_kl)


# --- gae ---


def _check_gae(
    values: Tensor,
    rewards: Tensor | None,
    mask: Tensor | None,
    kl: Tensor | None,
    scores: Tensor | None,
    has_eos: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
) -> dict[str, Tensor | None]:
    op = "gae"
    if values.dim() == 0:
        raise ValueError(f"{op}: `values` has shape [], expected [..., seq_len]")
    tokens = (values.shape, values.device)
    rows = (values.shape[:-1], values.device)
    return {
        "values": _f32(op, "values", values, *tokens),
        "rewards": _optional(_f32, op, "rewards", rewards, *tokens),
        "kl": _optional(_f32, op, "kl", kl, *tokens),
        "scores": _optional(_f32, op, "scores", scores, *rows),
        "has_eos": _optional(_mask, op, "has_eos", has_eos, *rows),
        "mask": _optional(_mask, op, "mask", mask, *tokens),
        "dones": _optional(_mask, op, "dones", dones, *tokens),
        "bootstrap": _optional(_f32, op, "bootstrap", bootstrap, *rows),
    }


def _gae_outputs(values: Tensor, want_rewards: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    moments = torch.empty(3, dtype=torch.float64, device=values.device)
    return advantages, returns, _wanted(values, want_rewards), moments


def _gae(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, want_rewards = arguments[:9]
    options = arguments[9:]
    inputs = _check_gae(*tensors)
    values = inputs["values"]
    advantages, returns, rewards, moments = _large_pages(*_gae_outputs(values, want_rewards))
    seq_len = values.shape[-1]
    batch = values.shape[:-1].numel()
    _call(
        "gae",
        values,
        (batch, seq_len),
        byref(_lib.GaeInputs(**{name: _pointer(tensor) for name, tensor in inputs.items()})),
        batch,
        seq_len,
        byref(_lib.gae_options(*options)),
        byref(
            _lib.GaeOutputs(
                advantages=advantages.data_ptr(),
                returns=returns.data_ptr(),
                rewards=_pointer_if(rewards, want_rewards),
                moments=moments.data_ptr(),
            )
        ),
    )
    return advantages, returns, rewards, moments


def _gae_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, want_rewards = arguments[:9]
    return _gae_outputs(_check_gae(*tensors)["values"], want_rewards)


gae = _define(
    "gae(Tensor values, Tensor? rewards, Tensor? mask, Tensor? kl, Tensor? scores, Tensor? has_eos,"
    " Tensor? dones, Tensor? bootstrap, bool want_rewards, float gamma, float lam,"
    " float? value_lam, float kl_coef, float score_mean, float? score_std, float? score_clip,"
    " float missing_eos_value, str mask_mode, str score_placement, str score_order,"
    " str missing_eos) -> (Tensor advantages, Tensor returns, Tensor rewards, Tensor moments)",
    _gae,
    _gae_fake,
)


# --- whiten ---


def _check_whiten(op: str, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    like = (values.shape, values.device)
    return _f32(op, "values", values, *like), _optional(_mask, op, "mask", mask, *like)


def _check_moments(op: str, moments: Tensor, device: torch.device) -> Tensor:
    if moments.dtype is not torch.float64:
        _refuse_dtype(op, "moments", moments, "float64")
    check_shape(op, "moments", moments, torch.Size((3,)))
    check_device(op, "moments", moments, device)
    return moments.contiguous()


def _masked_moments(values: Tensor, mask: Tensor | None) -> Tensor:
    values, mask = _check_whiten("masked_moments", values, mask)
    moments = torch.empty(3, dtype=torch.float64, device=values.device)
    elements = values.numel()
    arguments = (values.data_ptr(), _pointer(mask), elements, moments.data_ptr())
    _call("whiten_moments", values, (elements,), *arguments)
    return moments


def _masked_moments_fake(values: Tensor, mask: Tensor | None) -> Tensor:
    _check_whiten("masked_moments", values, mask)
    return torch.empty(3, dtype=torch.float64, device=values.device)


def _whiten_with(values: Tensor, mask: Tensor | None, moments: Tensor, *options: Any) -> Tensor:
    op = "masked_whiten"
    values, mask = _check_whiten(op, values, mask)
    moments = _check_moments(op, moments, values.device)
    (whitened,) = _large_pages(torch.empty_like(values))
    elements = values.numel()
    _call(
        "whiten_forward",
        values,
        (elements,),
        values.data_ptr(),
        _pointer(mask),
        elements,
        byref(_lib.whiten_options(*options)),
        moments.data_ptr(),
        whitened.data_ptr(),
    )
    return whitened


def _whiten_with_fake(values: Tensor, mask: Tensor | None, moments: Tensor, *_: Any) -> Tensor:
    _check_moments("masked_whiten", moments, values.device)
    return torch.empty_like(_check_whiten("masked_whiten", values, mask)[0])


def _whiten(values: Tensor, mask: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    moments = _masked_moments(values, mask)
    return _whiten_with(values, mask, moments, *options), moments


def _whiten_fake(values: Tensor, mask: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    values, mask = _check_whiten("masked_whiten", values, mask)
    return torch.empty_like(values), _masked_moments_fake(values, mask)


def _whiten_backward(
    values: Tensor | None, mask: Tensor | None, moments: Tensor, grad: Tensor, *options: Any
) -> Tensor:
    """Through the moments too where the values are given."""
    op = "masked_whiten_backward"
    like = (grad.shape, grad.device)
    grad = _f32(op, "grad", grad, *like)
    values = _optional(_f32, op, "values", values, *like)
    mask = _optional(_mask, op, "mask", mask, *like)
    moments = _check_moments(op, moments, grad.device)
    (grad_values,) = _large_pages(torch.empty_like(grad))
    elements = grad.numel()
    rest = (
        _pointer(mask),
        elements,
        byref(_lib.whiten_options(*options)),
        moments.data_ptr(),
        grad.data_ptr(),
        grad_values.data_ptr(),
    )
    if values is None:
        _call("whiten_with_backward", grad, (elements,), *rest)
    else:
        _call("whiten_backward", grad, (elements,), values.data_ptr(), *rest)
    return grad_values


def _whiten_backward_fake(
    values: Tensor | None, mask: Tensor | None, moments: Tensor, grad: Tensor, *_: Any
) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


_WHITEN_OPTIONS = "bool shift_mean, bool unbiased, float eps, str eps_placement"

masked_moments = _define(
    "masked_moments(Tensor values, Tensor? mask) -> Tensor", _masked_moments, _masked_moments_fake
)
masked_whiten = _define(
    f"masked_whiten(Tensor values, Tensor? mask, {_WHITEN_OPTIONS})"
    " -> (Tensor whitened, Tensor moments)",
    _whiten,
    _whiten_fake,
)
masked_whiten_with = _define(
    f"masked_whiten_with(Tensor values, Tensor? mask, Tensor moments, {_WHITEN_OPTIONS}) -> Tensor",
    _whiten_with,
    _whiten_with_fake,
)
masked_whiten_backward = _define(
    "masked_whiten_backward(Tensor? values, Tensor? mask, Tensor moments, Tensor grad,"
    f" {_WHITEN_OPTIONS}) -> Tensor",
    _whiten_backward,
    _whiten_backward_fake,
)


def _keep_whiten(ctx: Any, inputs: tuple, outputs: tuple) -> None:
    moments = outputs[1]
    ctx.save_for_backward(*inputs[:2], moments)
    ctx.options = inputs[2:]
    ctx.mark_non_differentiable(moments)


def _backward_of_whiten(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 6
    return masked_whiten_backward(*ctx.saved_tensors, grad, *ctx.options), *(None,) * 5


def _keep_whiten_with(ctx: Any, inputs: tuple, _: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.options = inputs[3:]


def _backward_of_whiten_with(ctx: Any, grad: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 7
    return masked_whiten_backward(None, *ctx.saved_tensors, grad, *ctx.options), *(None,) * 6


_differentiate(masked_whiten, _whiten, _keep_whiten, _backward_of_whiten)
_differentiate(masked_whiten_with, _whiten_with, _keep_whiten_with, _backward_of_whiten_with)


# --- ppo_loss ---


_PPO_TENSORS = (
    "logp",
    "old_logp",
    "advantages",
    "values",
    "old_values",
    "returns",
    "entropy",
    "ref_logp",
)


def _check_ppo_loss(*tensors: Tensor | None) -> dict[str, Tensor | None]:
    op, logp = "ppo_loss", tensors[0]
    if logp.dim() == 0:
        raise ValueError(f"{op}: `logp` has shape [], expected [..., seq_len]")
    like = (logp.shape, logp.device)
    *numbers, mask = tensors
    checked = {
        name: _optional(_f32, op, name, tensor, *like)
        for name, tensor in zip(_PPO_TENSORS, numbers)
    }
    return {**checked, "mask": _optional(_mask, op, "mask", mask, *like)}


def _ppo_loss_outputs(logp: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    loss = torch.empty((), dtype=torch.float32, device=logp.device)
    stats = torch.empty(len(_lib.STATS), dtype=torch.float32, device=logp.device)
    return loss, stats, *(_wanted(logp, want) for want in wanted)


def _ppo_loss_pointers(gradients: tuple[Tensor, ...], wanted: tuple[bool, bool, bool]) -> Any:
    pointers = map(_pointer_if, gradients, wanted)
    return byref(_lib.PpoLossGradients(**dict(zip(("logp", "values", "entropy"), pointers))))


def _ppo_loss(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, wanted, options = arguments[:9], arguments[9:12], arguments[12:]
    inputs = _check_ppo_loss(*tensors)
    logp = inputs["logp"]
    loss, stats, *gradients = _large_pages(*_ppo_loss_outputs(logp, wanted))
    # The library writes doubles on the CPU.
    raw = torch.empty_like(stats, dtype=torch.float64) if logp.is_cpu else stats
    shape = logp.shape[:-1].numel(), logp.shape[-1]
    options = byref(_lib.ppo_loss_options(*options))
    _call(
        "ppo_loss",
        logp,
        (*shape, options),
        byref(_lib.PpoLossInputs(**{name: _pointer(tensor) for name, tensor in inputs.items()})),
        *shape,
        options,
        raw.data_ptr(),
        _ppo_loss_pointers(gradients, wanted),
    )
    if logp.is_cpu:
        stats.copy_(raw)
    return loss.copy_(stats[0]), stats, *gradients


def _ppo_loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _ppo_loss_outputs(_check_ppo_loss(*arguments[:9])["logp"], arguments[9:12])


def _ppo_loss_backward(grad: Tensor, *stored: Tensor) -> tuple[Tensor, ...]:
    op = "ppo_loss_backward"
    grad = _f32(op, "grad", grad, torch.Size(()), stored[0].device)
    wanted = tuple(gradient.numel() > 0 for gradient in stored)
    tokens = max(gradient.numel() for gradient in stored)
    gradients = _large_pages(*_room_like_stored(grad, *stored))
    pointers = _ppo_loss_pointers(stored, wanted), _ppo_loss_pointers(gradients, wanted)
    _call("ppo_loss_scale", grad, (tokens,), grad.data_ptr(), tokens, *pointers)
    return gradients


def _room_like_stored(grad: Tensor, *stored: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(gradient) for gradient in stored)


ppo_loss = _define(
    "ppo_loss(Tensor logp, Tensor old_logp, Tensor advantages, Tensor? values, Tensor? old_values,"
    " Tensor? returns, Tensor? entropy, Tensor? ref_logp, Tensor? mask, bool want_logp,"
    " bool want_values, bool want_entropy, float clip_range, float? clip_range_high,"
    " float? dual_clip, float? log_ratio_clamp, float? value_clip_range, float value_coef,"
    " float entropy_coef, float kl_coef, str kl_estimator, float? kl_log_ratio_clamp,"
    " float? kl_output_clamp, str aggregation, float? aggregation_divisor, float? denominator,"
    " str clip_fraction) -> (Tensor loss, Tensor stats, Tensor grad_logp, Tensor grad_values,"
    " Tensor grad_entropy)",
    _ppo_loss,
    _ppo_loss_fake,
)


ppo_loss_backward = _define(
    "ppo_loss_backward(Tensor grad, Tensor grad_logp, Tensor grad_values, Tensor grad_entropy)"
    " -> (Tensor, Tensor, Tensor)",
    _ppo_loss_backward,
    _room_like_stored,
)


def _keep_ppo_loss(ctx: Any, inputs: tuple, outputs: tuple) -> None:
    _, stats, *gradients = outputs
    ctx.save_for_backward(*gradients)
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(stats, *gradients)


def _backward_of_ppo_loss(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
    if grad is None:
        return (None,) * ctx.inputs
    needs = ctx.needs_input_grad[1:]
    stored = ctx.saved_tensors
    # After loss.backward() the stored ones are what is wanted. Looking costs nothing on the CPU.
    as_stored = type(grad) is Tensor and grad.is_cpu and grad.item() == 1.0
    scaled = stored if as_stored else ppo_loss_backward(grad, *stored)
    gradients = dict(zip((0, 3, 6), scaled))  # of logp, values and entropy
    # What else asks for a gradient, old_logp say, is a constant.
    return tuple(gradients.get(i) if needs[i] else None for i in range(ctx.inputs))


_differentiate(ppo_loss, _ppo_loss, _keep_ppo_loss, _backward_of_ppo_loss)
