"""A native library that is absent, or was built from other sources than those beside it, is never called: PyTorch's operations serve."""

import functools
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from disaggd import kernels
from disaggd.kernels import int8, native, native_sources, onednn, reference

HERE = Path(native.__file__).parent
NO_NATIVE = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built: python setup.py build_ext --inplace")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory in which the library and its sources are looked for instead."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "library", functools.cache(native.library.__wrapped__))
    for chosen in (kernels.cpu_ops, kernels.cpu_int8_ops):
        chosen.cache_clear()
    yield tmp_path
    for chosen in (kernels.cpu_ops, kernels.cpu_int8_ops):
        chosen.cache_clear()


def copy_library(directory: Path) -> None:
    (built,) = HERE.glob("_native.*.so")
    shutil.copy(built, directory)


def warnings_of_selecting(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said when operations are chosen, more than once and for both kinds of weights: all of them PyTorch's."""
    cpu = torch.device("cpu")
    for plain, quantized in [(kernels.select(cpu), kernels.select(cpu, "int8"))] * 2:
        assert (plain.paged_attention, plain.linear) == (reference.PagedAttention, onednn.linear)
        assert (quantized.pack, quantized.linear, quantized.linear_silu_mul) == (int8.pack, int8.linear, int8.linear_silu_mul)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.usefixtures("elsewhere")
def test_without_a_library_there_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = warnings_of_selecting(caplog)
    assert "no native CPU kernels" in warning


@NO_NATIVE
@pytest.mark.parametrize(
    "change", [lambda path: path.write_text(path.read_text() + "\n"), lambda path: path.rename(path.with_stem("other"))]
)
def test_a_library_of_other_sources_is_not_used(elsewhere: Path, change, caplog: pytest.LogCaptureFixture) -> None:
    copy_library(elsewhere)
    shutil.copytree(HERE / "native", elsewhere / "native")
    change(elsewhere / "native/decoder.h")
    (warning,) = warnings_of_selecting(caplog)
    assert "the native kernels were built from other sources: run make" in warning


def test_a_library_that_does_not_say_what_it_was_built_from_is_of_other_sources(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(HERE / "native", elsewhere / "native")
    strange = torch._C.__file__  # any library that knows nothing of this
    (elsewhere / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").symlink_to(strange)
    (warning,) = warnings_of_selecting(caplog)
    assert "built from other sources" in warning


@NO_NATIVE
@pytest.mark.parametrize("has_sources", [True, False], ids=["in a checkout", "from a wheel"])
def test_a_library_of_these_sources_is_used(elsewhere: Path, has_sources: bool, caplog: pytest.LogCaptureFixture) -> None:
    copy_library(elsewhere)
    if has_sources:
        shutil.copytree(HERE / "native", elsewhere / "native")
    assert native.library() is not None and not caplog.records


def test_the_digest_is_of_the_sources_alone(tmp_path: Path) -> None:
    shutil.copytree(HERE / "native", tmp_path / "native")
    (tmp_path / "native/decoder.h~").write_text("an editor's")
    assert native_sources.digest(tmp_path / "native") == native_sources.digest(HERE / "native")
