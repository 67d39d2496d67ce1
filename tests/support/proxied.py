"""`ProxiedCluster`: a cluster whose router reaches each engine node through a proxy, which a test may cut, stall or slow down.

Its nodes may live in the namespaces of a wire of ours, which KV takes and a test may harm as well.
"""

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from tests.support.clusters import Block, Cluster, free_port
from tests.support.proxy import GOOD, Condition, Connect, LinkProxy
from tests.support.territory import Wire, connector

Result = TypeVar("Result")

CALL_S = 20.0


class ProxiedCluster(Cluster):
    """Two files: the nodes' own, with where they listen; and the router's, with where the proxies do.

    Without a `wire` all of it is on loopback.
    """

    def __init__(self, directory: Path, *, wire: Wire | None = None, transfer: Block | None = None, **options: Any) -> None:
        super().__init__(directory, transfer={"devices": "lo" if wire is None else wire.device, **(transfer or {})}, **options)
        self.wire = wire
        self._spaces = {} if wire is None else {"prefill": wire.prefill, "decode": wire.decode}
        for node in self.nodes.values():
            if (space := self._spaces.get(node.role)) is not None:
                node.prefix = space.prefix
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._ports = {name: free_port() for name in (*self.names("prefill"), *self.names("decode"))}
        self._proxies = {name: LinkProxy(self.connector_of(name)) for name in self._ports}

    def connector_of(self, name: str) -> Connect:
        """How this node is reached from here."""
        node = self.nodes[name]
        return connector(node.port, self._spaces.get(node.role))

    def config_of(self, name: str) -> Path:
        return self.directory / "router.toml" if name == "router" else self.config

    def write_config(self) -> None:
        super().write_config()
        text = self.config.read_text()
        for name, port in self._ports.items():
            text = text.replace(f'"127.0.0.1:{self.nodes[name].port}"', f'"127.0.0.1:{port}"')
        self.config_of("router").write_text(text)

    def start(self) -> None:
        self._thread.start()
        for name, proxy in self._proxies.items():
            self._call(proxy.listen(self._ports[name]))
        super().start()

    def close(self) -> None:
        try:
            super().close()
        finally:
            for proxy in self._proxies.values():
                self._call(proxy.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CALL_S)
            self._loop.close()

    def set_link(self, name: str, condition: Condition) -> None:
        """The link to this node is so from now on."""
        self._loop.call_soon_threadsafe(self._proxies[name].set, condition)

    def mend_links(self) -> None:
        for name in self._proxies:
            self.set_link(name, GOOD)

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_S)
