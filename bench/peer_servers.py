"""The servers that `peers.py` compares, behind one face: each serves one model on the same two cores, and knows of no other.

vLLM and llama.cpp are started as their documents say, but for what is named here; README.md says how to set them up.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import msgspec
from cluster import Fields, config_text, running
from server_process import free_ports, serving

MAX_MODEL_LEN = 4096
CONCURRENCY = 8
"""The most requests at once that any server must have room for."""
_VLLM_START_S = 300.0
_SERVED_NAME = "model"


class Served(msgspec.Struct, frozen=True):
    """A server that answers, by token ids."""

    url: str
    model: str
    """What it calls the model."""
    pids: tuple[int, ...]
    """Its processes; their descendants are not named."""


Serve = Callable[[Path], AbstractContextManager[Served]]
"""A server for as long as the context lasts; its files and logs go into the directory."""


class Contender(msgspec.Struct, frozen=True):
    serve: Serve
    against: str | None
    """The contender of ours that it is compared with; None for ours."""


def contenders(model: str, vllm: Path | None, llama_server: Path | None, gguf: Path | None) -> dict[str, Contender]:
    """By name, in the order in which they take their turns. `vllm` is the interpreter that can import it."""
    found = {
        "disaggd": Contender(partial(_disaggd, _CO_LOCATED, "never", model), None),
        "disaggd 1P1D": Contender(partial(_disaggd, _PAIR, "always", model), None),
    }
    if vllm is not None:
        found["vLLM"] = Contender(partial(_vllm, _Vllm(vllm, model)), "disaggd")
        found["vLLM, libgomp"] = Contender(partial(_vllm, _Vllm(vllm, model, has_iomp=False)), "disaggd")
        found["vLLM 1P1D"] = Contender(partial(_vllm_pair, _Vllm(vllm, model)), "disaggd 1P1D")
    if llama_server is not None and gguf is not None:
        found["llama.cpp"] = Contender(partial(_llama_server, llama_server, gguf), "disaggd")
    return found


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_CO_LOCATED: tuple[Fields, ...] = ({"role": "router"}, {"role": "decode", "threads": 2})
_PAIR: tuple[Fields, ...] = ({"role": "router"}, {"role": "prefill", "cpus": (0,)}, {"role": "decode", "cpus": (1,)})


@contextlib.contextmanager
def _disaggd(nodes: tuple[Fields, ...], policy: str, model: str, directory: Path) -> Iterator[Served]:
    config = directory / "disaggd.toml"
    fields = {"path": model, "name": _SERVED_NAME, "dtype": "bfloat16", "max_model_len": MAX_MODEL_LEN}
    config.write_text(config_text(nodes, model=fields, disaggregation={"policy": policy}))
    with running(config, directory / "disaggd.log") as cluster:
        yield Served(cluster.url, cluster.model, cluster.pids)


# ── vLLM ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Vllm(msgspec.Struct, frozen=True):
    """Its CPU build and how it is started: with the malloc and the OpenMP that it says are best, or with torch's own OpenMP."""

    python: Path
    model: str
    has_iomp: bool = True

    def process(
        self, port: int, cpus: str, log: Path, options: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
    ) -> AbstractContextManager[int]:
        """Its command `vllm serve` asks for a package by another name than the CPU build's, so its module is called."""
        where = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", _SERVED_NAME)
        what = ("--model", self.model, "--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN))
        iomp = str(self.python.parents[1] / "lib" / "libiomp5.so")
        settings = {
            "VLLM_CPU_OMP_THREADS_BIND": cpus,
            "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
            "LD_PRELOAD": ":".join(("libtcmalloc_minimal.so.4", *([iomp] if self.has_iomp else []))),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server", *where, *what, *options]
        ready_url = f"http://127.0.0.1:{port}/health"
        return serving(command, ready_url, log, environment={**settings, **(environment or {})}, start_s=_VLLM_START_S)


@contextlib.contextmanager
def _vllm(vllm: _Vllm, directory: Path) -> Iterator[Served]:
    (port,) = free_ports(1)
    with vllm.process(port, "0-1", directory / "vllm.log") as pid:
        yield Served(f"http://127.0.0.1:{port}", _SERVED_NAME, (pid,))


@contextlib.contextmanager
def _vllm_pair(vllm: _Vllm, directory: Path) -> Iterator[Served]:
    """A core each, over its NixlConnector, and the proxy that it wants."""
    proxy, prefill, decode, prefill_side, decode_side = free_ports(5)
    halves = (("kv_producer", prefill, prefill_side, "0"), ("kv_consumer", decode, decode_side, "1"))
    with contextlib.ExitStack() as stack:
        pids = []
        for role, port, side, cpu in halves:
            transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
            options = ("--kv-transfer-config", msgspec.json.encode(transfer).decode())
            environment = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(side), "UCX_NET_DEVICES": "lo", "UCX_TLS": "shm,tcp,self"}
            pids.append(stack.enter_context(vllm.process(port, cpu, directory / f"{role}.log", options, environment)))
        command = [sys.executable, str(Path(__file__).with_name("nixl_proxy.py")), str(proxy), str(prefill), str(decode)]
        url = f"http://127.0.0.1:{proxy}"
        pids.append(stack.enter_context(serving(command, url, directory / "proxy.log")))
        yield Served(url, _SERVED_NAME, tuple(pids))


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _llama_server(binary: Path, gguf: Path, directory: Path) -> Iterator[Served]:
    (port,) = free_ports(1)
    where = ("--host", "127.0.0.1", "--port", str(port), "--alias", _SERVED_NAME)
    slots = ("--parallel", str(CONCURRENCY), "--ctx-size", str(CONCURRENCY * MAX_MODEL_LEN))
    command = [str(binary), "--model", str(gguf), "--threads", "2", *where, *slots]
    with serving(command, f"http://127.0.0.1:{port}/health", directory / "llama.log") as pid:
        yield Served(f"http://127.0.0.1:{port}", _SERVED_NAME, (pid,))
