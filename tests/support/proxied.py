"""`ProxiedCluster`: a cluster whose router reaches each engine node through a proxy, which a test may cut, stall or slow down."""

import asyncio
import socket
import threading
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tests.support.clusters import Cluster, free_port
from tests.support.proxy import GOOD, Condition, Connect, LinkProxy

Result = TypeVar("Result")

CALL_S = 20.0


class ProxiedCluster(Cluster):
    """Two files: the nodes' own, with where they listen; and the router's, with where the proxies do."""

    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__(directory, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._ports = {name: free_port() for name in (*self.names("prefill"), *self.names("decode"))}
        self._proxies = {name: LinkProxy(self.connector_of(name)) for name in self._ports}

    def connector_of(self, name: str) -> Connect:
        """How this node is reached from here."""
        return connector(self.nodes[name].port)

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


def connector(port: int) -> Connect:
    """Connects to 127.0.0.1:`port`."""

    async def connect() -> socket.socket:
        made = await asyncio.to_thread(partial(socket.create_connection, ("127.0.0.1", port), 5))
        made.setblocking(False)
        return made

    return connect
