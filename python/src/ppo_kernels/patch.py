"""Patches TRL, verl and OpenRLHF in every process whose environment says so::

    PPO_KERNELS_PATCH=verl,trl python -m ...

The variable is inherited by the processes that a trainer starts, Ray's workers among them, where a
call of :mod:`.adapters` in the launching script does nothing. An installed package needs no more:
Python reads its ``ppo_kernels.pth`` at its start, and verl, in each of its processes, its entry
point. From a folder on ``PYTHONPATH`` no ``.pth`` is read: ``import ppo_kernels.patch`` does the
same there. Without the variable nothing is done.

A module is patched as soon as it is imported, and each says once, on the standard error, what was
replaced in it.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import Patch

__all__ = ["PACKAGES", "VARIABLE", "calls"]

VARIABLE = "PPO_KERNELS_PATCH"
PACKAGES = ("trl", "verl", "openrlhf")

_patches: dict[str, Patch] = {}


def calls() -> dict[str, int]:
    """How many calls of each function that is replaced in this process ours has answered."""
    return {name: count for patch in _patches.values() for name, count in patch.calls.items()}


def _patch(module: ModuleType) -> None:
    from . import adapters, library_version

    name = module.__name__
    package = name.split(".")[0]
    patch = _patches.setdefault(package, adapters.Patch(package))
    before = set(patch.calls)
    adapters.PARTS[package][name](patch, module)
    replaced = [each.removeprefix(f"{name}.") for each in patch.calls if each not in before]
    adapters.check_replaced(package, replaced, name)
    print(
        f"ppo-kernels {library_version()}: replaced in {name} of {package} "
        f"{adapters.version_of(package)}: {', '.join(replaced)}",
        file=sys.stderr,
        flush=True,
    )


class _Loader(importlib.abc.Loader):
    """A module's own loader, and the patch behind it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that have something to replace, by the other finders."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        # Not for the package by itself: what is asked of needs torch.
        if not rest or package not in self._packages:
            return None
        from .adapters import PARTS

        if name not in PARTS[package]:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Refusal(importlib.abc.MetaPathFinder):
    """Says that the variable is wrong where one of the packages is imported: what goes wrong with a
    ``.pth`` or a plugin stops nothing."""

    def __init__(self, message: str) -> None:
        self._message = message

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in PACKAGES:
            raise ValueError(self._message)


def _install() -> None:
    names = os.environ.get(VARIABLE, "")
    packages = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in packages if name not in PACKAGES]
    if unknown:
        message = f"{VARIABLE} is {names!r}, expected names of {', '.join(PACKAGES)}"
        sys.meta_path.insert(0, _Refusal(message))
        raise ValueError(message)
    if not packages:
        return
    sys.meta_path.insert(0, _Finder(packages))
    # What was imported before.
    loaded = [name for name in sys.modules if name.split(".")[0] in packages]
    if loaded:
        from .adapters import PARTS

        for name in loaded:
            if name in PARTS[name.split(".")[0]]:
                _patch(sys.modules[name])


_install()
