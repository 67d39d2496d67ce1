"""The CPU kernels: an optional library. Where it cannot be built, disaggd installs all the same and serves from PyTorch's operations."""

import os
import platform
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


class BuildAtOnce(build_ext):
    """A processor for each file of an extension: an instruction set's takes half a minute or more."""

    def build_extension(self, ext: Extension) -> None:
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compiled = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [path for paths in compiled for path in paths]

        self.compiler.compile = compile_at_once
        super().build_extension(ext)


setup(ext_modules=[NATIVE] if platform.machine() in ("x86_64", "AMD64") else [], cmdclass={"build_ext": BuildAtOnce})
