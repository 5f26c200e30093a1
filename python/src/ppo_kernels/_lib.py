"""The C library: where it is, its passes, options as its structs, its errors as exceptions.

``include/ppo_kernels.h`` says what every function does, and ``_header`` is made of it. Addresses
are integers, 0 for what is not there. A function that fails leaves a text, which :func:`fail`
raises.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from struct import Struct
from typing import Any, NoReturn

from . import _header

# Element types of logits and of token ids, by the names that NumPy and PyTorch give them.
LOGITS = {"float32": _header.F32, "float16": _header.F16, "bfloat16": _header.BF16}
TARGETS = {"int32": _header.U32, "uint32": _header.U32, "int64": _header.I64}

STATS = tuple(name for name, _ in _header.ppo_loss_stats._fields_)
ADVANTAGE_STATS = tuple(name for name, _ in _header.advantages_stats._fields_)
PREFERENCE_STATS = tuple(name for name, _ in _header.preference_stats._fields_)
CORRECTION_STATS = tuple(name for name, _ in _header.correction_stats._fields_)


def _path() -> Path:
    if given := os.environ.get("PPO_KERNELS_LIB"):
        return Path(given)
    names = ("libppo_kernels.so", "libppo_kernels.dylib", "ppo_kernels.dll")
    for name in names:
        path = Path(__file__).with_name(name)
        if path.exists():
            return path
    raise ImportError(
        "ppo_kernels: the compiled library is not in the package. Install it with "
        "`pip install ./python`, or name a library in PPO_KERNELS_LIB"
    )


_library = ctypes.CDLL(str(_path()))


def function(name: str) -> Callable:
    """One of the header, by its name without the prefix."""
    found = _library[f"ppok_{name}"]
    found.restype, found.argtypes = _header.FUNCTIONS[name]
    return found


last_error, version_string = function("last_error"), function("version_string")
set_team, num_threads = function("set_team"), function("num_threads")
instruction_set = function("instruction_set")


def fail(status: int, renamed: Mapping[str, str]) -> NoReturn:
    """Raises what the thread's last call said, in the names that arguments have here: the argument
    was wrong, or something else was.

    Statuses beyond those are the library's, the machine's, or, as that of what is written over
    something else, this package's: results are memory of their own.
    """
    wrong_argument = _header.STATUS_SHAPE <= status <= _header.STATUS_MISALIGNED
    said = last_error().decode()
    said = re.sub(r"`(\w+)`", lambda name: f"`{renamed.get(name[1], name[1])}`", said)
    raise (ValueError if wrong_argument else RuntimeError)(said)


# --- Options ---

# Names of the header that are others here.
_RENAMED = {"lambda": "lam", "value_lambda": "value_lam", "at_last": "last"}
# What stands for None where that is not NONE.
_ABSENT = {"aggregation_divisor": 0.0}


class Address(int):
    """That of a struct, which it keeps alive."""

    struct: ctypes.Structure


class Options:
    """The options of an op, by name, but for those ``without``: ``fields`` has the header's names,
    ``kinds`` the types in torch's schemas, or what can be chosen. ``address`` makes the library's
    struct of values in that order, once for each set of them."""

    def __init__(self, name: str, op: str, *without: str) -> None:
        self.op = op
        self.struct = getattr(_header, f"{name}_options")
        kinds = {f: kind for f, kind in _header.OPTIONS[name].items() if f not in without}
        self.fields = {_RENAMED.get(field, field): field for field in kinds}
        self.kinds = {option: _kind(option, kinds[field]) for option, field in self.fields.items()}
        self.address = lru_cache(maxsize=256)(self._make)

    def among(self, arguments: Mapping[str, Any]) -> Address:
        """Of the values that the options have there, by their names."""
        return self.address(*map(arguments.__getitem__, self.kinds))

    def defaults(self) -> dict[str, Any]:
        """What they are where nothing is set."""
        default = self.struct()
        size = ctypes.sizeof(self.struct)
        function(f"{self.struct.__name__}_init")(ctypes.addressof(default), size)
        return self._values(default)

    def _values(self, options: ctypes.Structure) -> dict[str, Any]:
        """Those of a struct of the library's."""
        values = {}
        for option, kind in self.kinds.items():
            value = getattr(options, self.fields[option])
            absent = kind == "float?" and value == _ABSENT.get(option, _header.NONE)
            if isinstance(kind, tuple):
                value = kind[value]
            elif absent or kind == "int?" and not getattr(options, f"has_{option}"):
                value = None
            values[option] = bool(value) if kind == "bool" else value
        return values

    def named(self, name: str) -> dict[str, Any]:
        """Those that the library has under a name, but for what is as by default."""
        of_name = self.struct()
        named = function(f"{self.struct.__name__}_named")
        size = ctypes.sizeof(self.struct)
        if status := named(ctypes.addressof(of_name), size, name.encode()):
            fail(status, {})
        default = self.defaults()
        values = self._values(of_name).items()
        return {option: value for option, value in values if value != default[option]}

    def _make(self, *values: Any) -> Address:
        options = self.struct(ctypes.sizeof(self.struct))
        for (name, kind), value in zip(self.kinds.items(), values):
            if kind == "int?":
                setattr(options, f"has_{name}", value is not None)
            setattr(options, self.fields[name], self._number(name, kind, value))
        address = Address(ctypes.addressof(options))
        address.struct = options
        return address

    def _number(self, name: str, kind: str | tuple[str, ...], value: Any) -> float:
        option = f"{self.op}: option `{name}` is {value!r}, expected"
        absent = _ABSENT.get(name, 0 if kind == "int?" else _header.NONE)
        if isinstance(kind, tuple):
            if value not in kind:
                raise ValueError(f"{option} one of {', '.join(map(repr, kind))}")
            return kind.index(value)
        if value is None:
            return absent
        if kind == "float?" and value == absent == _header.NONE:
            raise ValueError(f"{option} None or 0 and above")  # not to be taken for None
        return value


def _kind(name: str, kind: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if name in _ABSENT:
        return "float?"
    return kind if isinstance(kind, str) else tuple(_RENAMED.get(each, each) for each in kind)


class Pass:
    """A pass on the CPU and on CUDA. Its struct of arguments is made of the address of its options
    and of values in the order of ``names``, which is the caller's: the struct's own order is looked
    up once. ``renamed`` has the struct's names that are others here."""

    def __init__(
        self, name: str, options: Options | None, names: Sequence[str], renamed: Mapping[str, str]
    ) -> None:
        self.options = options
        self.names = names
        self.renamed = {**_RENAMED, **renamed}
        self.struct = getattr(_header, f"{name}_args")
        self.cpu = function(f"{name}_cpu")
        self.cuda = function(f"{name}_cuda")
        self.workspace_size = function(f"{name}_cuda_workspace_size")
        self.needs_workspace = False
        first = ("struct_size", "reserved", "options", *names)
        self._in_order = itemgetter(*(first.index(field) for field, _ in self.struct._fields_))
        self._size = ctypes.sizeof(self.struct)
        # Makes what the ctypes struct would hold, several times as fast. Of a bytes object they are
        # aligned well enough, and the library refuses what is not.
        self._pack = Struct("".join(kind._type_ for _, kind in self.struct._fields_)).pack

    def arguments(self, options: int, *values: int) -> bytes:
        return self._pack(*self._in_order((self._size, 0, options, *values)))
