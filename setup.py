"""The CPU kernels: an optional library. Where it cannot be built, disaggd installs all the same and serves from PyTorch's operations."""

import platform
import runpy
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("disaggd/kernels/native")
DIGEST = runpy.run_path("disaggd/kernels/native_sources.py")["digest"](SOURCES)

NATIVE = Extension(
    "disaggd.kernels._native",  # loaded with ctypes: it knows nothing of Python
    sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
    depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
    define_macros=[("DISAGGD_SOURCES", f'"{DIGEST}"')],
    # Results are to be the same bits wherever a sequence goes on, so no -ffast-math; each file names its own instruction set.
    extra_compile_args=[
        *("-std=gnu++17", "-O3", "-g0", "-fno-math-errno", "-fno-exceptions", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),  # the latter: GCC's own intrinsics
    ],
    language="c++",
    optional=True,
)

setup(ext_modules=[NATIVE] if platform.machine() in ("x86_64", "AMD64") else [])
