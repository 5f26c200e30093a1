"""Imports modules of TRL, verl and OpenRLHF where they are installed without what they depend on.

What is missing and only imported, not used, by the functions that the tests call is stood in for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

STOOD_IN = {
    "accelerate",
    "aiohttp",
    "codetiming",
    "datasets",
    "deepspeed",
    "flash_attn",
    "huggingface_hub",
    "hydra",
    "latex2sympy2_extended",
    "math_verify",
    "omegaconf",
    "orjson",
    "pandas",
    "peft",
    "pylatexenc",
    "ray",
    "tensordict",
    "torchdata",
    "tqdm",
    "transformers",
    "vllm",
}


class _Thing(type):
    """A class of which every attribute is another: a base, a decorator, a type or a flag."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Thing(name, (), {})

    def __or__(cls, other):
        return cls

    __ror__ = __or__

    def __getitem__(cls, _):
        return cls

    def __call__(cls, *args, **kwargs):
        # With Triton TRL has kernels of its own, which are what to compare with. Other questions
        # of the kind are answered by no; decorators give back what they decorate.
        if cls.__name__ == "is_triton_available":
            return importlib.util.find_spec("triton") is not None
        if cls.__name__.startswith("is_"):
            return False
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return _Thing(cls.__name__, (), {})


class _Module(types.ModuleType):
    __path__: list[str] = []
    __version__ = "99.0.0"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Thing(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last, so that what is installed is what is imported."""

    def find_spec(self, name, path=None, target=None):
        # flash_attn.ops would be taken for a kernel to use.
        if name.split(".")[0] in STOOD_IN and name != "flash_attn.ops":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def find(name: str) -> types.ModuleType | None:
    """A module of a peer, or None if the peer is not installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        return None
    return importlib.import_module(name)


class Config(dict):
    """What verl's functions read their options from."""

    __getattr__ = dict.__getitem__


sys.meta_path.append(_StandIns())
