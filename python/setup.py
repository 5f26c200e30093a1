"""Builds the C library with cargo and puts it into the package.

The crate is the folder above this one, or `crate/` in a source distribution, where it is copied.
CUDA kernels are built too if there is an nvcc, or if PPO_KERNELS_CUDA is 1; not if it is 0.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
CRATE = HERE / "crate" if (HERE / "crate").exists() else HERE.parent
# What the library is made of; Cargo.toml names the benches, and cargo wants to see what it names.
SOURCES = ("Cargo.toml", "Cargo.lock", "LICENSE", "build.rs", "src/", "kernels/", "benches/")


# Read by Python at its start, where the package is installed.
PTH = 'import os; os.environ.get("PPO_KERNELS_PATCH") and __import__("ppo_kernels.patch")\n'


def has_nvcc() -> bool:
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    places = [Path(home, "bin", "nvcc") for home in (*homes, "/usr/local/cuda") if home]
    named = os.environ.get("NVCC") or shutil.which("nvcc")
    return bool(named) or any(place.exists() for place in places)


def build_library() -> Path:
    """Runs cargo; the path of the library."""
    wanted = os.environ.get("PPO_KERNELS_CUDA")
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"PPO_KERNELS_CUDA is {wanted!r}, expected 0 or 1")
    features = "capi,cuda" if wanted == "1" or (wanted is None and has_nvcc()) else "capi"
    if shutil.which("cargo") is None:
        raise SystemExit("ppo-kernels is compiled by cargo, which is not on PATH: install Rust")
    # As in docs/c.md, so that one build serves both.
    command = ["cargo", "rustc", "--release", "--lib", "--crate-type", "cdylib,staticlib"]
    command += ["--locked", "--no-default-features", "--features", features]
    command += ["--message-format", "json-render-diagnostics"]
    if sys.platform == "linux":
        command += ["--", "-C", "link-arg=-Wl,-soname,libppo_kernels.so"]
    messages = subprocess.run(command, cwd=CRATE, check=True, stdout=subprocess.PIPE, text=True)
    for line in messages.stdout.splitlines():
        message = json.loads(line)
        if message["reason"] == "compiler-artifact" and message["target"]["name"] == "ppo_kernels":
            for name in message["filenames"]:
                if Path(name).suffix in (".so", ".dylib", ".dll"):
                    return Path(name)
    raise SystemExit("cargo made no shared library")


class BuildPackage(build_py):
    """Python files as they are, the library beside them, and what patches by the environment."""

    def run(self):
        super().run()
        library = build_library()
        root = HERE / "src" if self.editable_mode else Path(self.build_lib)
        package = root / "ppo_kernels"
        package.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, package / library.name)
        if not self.editable_mode:
            (root / "ppo_kernels.pth").write_text(PTH)


class PlatformWheel(bdist_wheel):
    """For one platform, and any Python: the library knows nothing of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


class SourceDistribution(sdist):
    """With the crate."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        command = ["cargo", "package", "--list", "--allow-dirty"]
        listed = subprocess.run(command, cwd=CRATE, check=True, stdout=subprocess.PIPE, text=True)
        for name in listed.stdout.splitlines():
            if name.startswith(SOURCES) and (CRATE / name).exists():
                target = Path(base_dir, "crate", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(CRATE / name, target)


setup(
    version=re.search(r'^version = "(.+)"', (CRATE / "Cargo.toml").read_text(), re.M)[1],
    cmdclass={
        "bdist_wheel": PlatformWheel,
        "build_py": BuildPackage,
        "sdist": SourceDistribution,
    },
    distclass=BinaryDistribution,
)
