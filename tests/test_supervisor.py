"""`disaggd up` over stand-ins for nodes: tiny processes, real signals."""

import asyncio
import io
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from disaggd import supervisor
from disaggd.config import NodeConfig, Role, parse_config
from disaggd.errors import ConfigError, ResourceError
from disaggd.ids import NodeName
from disaggd.supervisor import ClusterView, LinkedNode, LinkedPair, OnReady, Supervisor, banner, check_ports, local_nodes, node_command
from disaggd.units import Address
from tests.support.certificates import make_certificates

WAIT = "import signal; print('up', flush=True); signal.sigwait({signal.SIGTERM}); print('ended', flush=True)"
"""A node that ends when it is told to. SIGTERM must be blocked to be waited for."""
BLOCKED = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
ROUTER = (
    BLOCKED
    + """
import socket, sys, threading
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
def answer():
    while True:
        client, _ = server.accept()
        client.recv(4096)
        client.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n" + sys.argv[2].encode())
        client.close()
threading.Thread(target=answer, daemon=True).start()
"""
    + WAIT
)
WHOLE = ClusterView(
    nodes=(LinkedNode("p0", "prefill", "10.0.0.1:8101", "up"), LinkedNode("d0", "decode", "10.0.0.2:8101", "up")),
    pairs=(LinkedPair("p0", "d0", "ready"),),
)
LISTEN = "import socket, sys\nserver = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
"""What a node does once it has loaded."""
ENGINE = BLOCKED + LISTEN + WAIT
STUBBORN = BLOCKED + LISTEN + "import signal; print('up', flush=True); signal.pause()"


class Screen(io.StringIO):
    """What the terminal shows; calls `reaction` once when `awaited` has been shown."""

    def __init__(self, awaited: str = "\0", reaction: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._awaited, self._reaction = awaited, reaction

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._awaited in text:
            self._awaited = "\0"
            self._reaction()
        return written

    @property
    def lines(self) -> list[str]:
        return self.getvalue().splitlines()


def node(name: str, role: Role, port: int) -> NodeConfig:
    return NodeConfig(name=NodeName(name), role=role, listen=Address(f"127.0.0.1:{port}"))


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def supervise(
    programs: dict[NodeConfig, str],
    screen: Screen,
    on_ready: OnReady = lambda router, view: None,
    grace_s: float = 10.0,
    last_grace_s: float = 10.0,
    view: ClusterView = WHOLE,
    **options: bool,
) -> int:
    shown = msgspec.json.encode(view).decode()

    async def limited() -> int:
        supervisor = Supervisor(
            tuple(programs),
            lambda node: [sys.executable, "-I", "-S", "-c", programs[node], str(node.listen.port), shown],
            on_ready,
            out=screen,
            grace_s=grace_s,
            last_grace_s=last_grace_s,
            restart_pause_s=0.001,
            **options,
        )
        async with asyncio.timeout(30):
            return await supervisor.run()

    return asyncio.run(limited())


def test_one_signal_ends_the_router_first_and_then_the_engines(free_port: Callable[[], int]) -> None:
    screen = Screen()
    programs = {node("d0", "decode", free_port()): ENGINE, node("router", "router", free_port()): ROUTER}
    assert supervise(programs, screen, on_ready=lambda router, view: terminate()) == 0
    assert [line for line in screen.lines if "ended" in line] == ["[router] ended", "[d0] ended"]


def test_ctrl_c_exits_130(free_port: Callable[[], int]) -> None:
    assert supervise({node("router", "router", free_port()): ROUTER}, Screen(), on_ready=lambda router, view: interrupt()) == 130


def test_a_node_that_cannot_start_ends_everything_with_its_code(free_port: Callable[[], int]) -> None:
    screen = Screen()
    refused = "import sys; print('[p0] 15:04:05 error: port taken'); sys.exit(3)"
    programs = {node("router", "router", free_port()): ROUTER.replace("200 OK", "503 Wait"), node("p0", "prefill", free_port()): refused}
    assert supervise(programs, screen) == 3
    assert "[p0] 15:04:05 error: port taken" in screen.lines
    assert any(line.endswith("error: could not start (exit code 3); ending the other nodes") for line in screen.lines)


def test_a_node_that_dies_later_is_restarted(free_port: Callable[[], int], tmp_path: Path) -> None:
    first = tmp_path / "first"
    dies_once = (
        f"import os\nif os.path.exists({str(first)!r}):\n    os.remove({str(first)!r})\n    os.kill(os.getpid(), 9)\n"
        "print('second life', flush=True)\n"
    )
    first.touch()
    gate = tmp_path / "gate"  # opened once the cluster is ready, so that the death comes after
    os.mkfifo(gate)
    programs = {
        node("router", "router", free_port()): ROUTER,
        node("d0", "decode", free_port()): LISTEN + f"open({str(gate)!r}).close()\n" + BLOCKED + dies_once + WAIT,
    }
    writers: list[int] = []
    screen = Screen("second life", terminate)
    assert supervise(programs, screen, on_ready=lambda router, view: writers.append(os.open(gate, os.O_RDWR))) == 0
    assert any(line.endswith("error: died (killed by SIGKILL); restarting it") for line in screen.lines)
    for writer in writers:
        os.close(writer)


@pytest.mark.parametrize("victim", ["router", "d0"])
def test_a_node_that_has_listened_is_restarted_while_another_still_loads(
    free_port: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    gate = tmp_path / "gate"  # opened once the router is ready and d0 is seen to listen, so that the death comes after
    os.mkfifo(gate)
    writers: list[int] = []
    dies_once = f"""
import os
if os.path.exists({str(gate)!r}):
    open({str(gate)!r}).close()
    os.remove({str(gate)!r})
    os.kill(os.getpid(), 9)
print('second life', flush=True)
"""
    programs = {
        node("router", "router", free_port()): ROUTER,
        node("d0", "decode", free_port()): ENGINE,
        node("p1", "prefill", free_port()): BLOCKED + WAIT,
    }
    programs = {each: text.replace(WAIT, dies_once + WAIT) if each.name == victim else text for each, text in programs.items()}

    def can_bind_of(host: str, port: int) -> bool:
        is_free = can_bind(host, port)
        if not is_free and not writers:
            writers.append(os.open(gate, os.O_RDWR))
        return is_free

    can_bind = supervisor._can_bind
    monkeypatch.setattr(supervisor, "_can_bind", can_bind_of)
    screen = Screen("second life", terminate)
    assert supervise(programs, screen) == 0
    assert any(line.startswith(f"[{victim}]") and line.endswith("error: died (killed by SIGKILL); restarting it") for line in screen.lines)
    assert "could not start" not in screen.getvalue()
    os.close(writers[0])


def test_a_node_that_has_never_listened_ends_everything_while_another_serves(free_port: Callable[[], int], tmp_path: Path) -> None:
    gate = tmp_path / "gate"  # opened once the router is ready
    os.mkfifo(gate)
    writers: list[int] = []
    programs = {
        node("router", "router", free_port()): ROUTER.replace("client.recv(4096)", "client.recv(4096), print('asked', flush=True)"),
        node("p1", "prefill", free_port()): f"open({str(gate)!r}).close(); raise SystemExit(3)",
    }
    screen = Screen("asked", lambda: writers.append(os.open(gate, os.O_RDWR)))
    assert supervise(programs, screen) == 3
    assert any(line.startswith("[p1]") and "could not start (exit code 3)" in line for line in screen.lines)
    os.close(writers[0])


def test_a_node_that_somebody_else_stops_is_restarted_and_did_not_die(free_port: Callable[[], int]) -> None:
    screen = Screen("restarting it", terminate)
    assert supervise({node("d0", "decode", free_port()): "raise SystemExit(0)"}, screen) == 0  # no router to wait for: ready from the start
    assert "error" not in screen.getvalue() and screen.lines[0].endswith(" ended in good order; restarting it")


def test_a_node_that_dies_too_often_ends_everything(free_port: Callable[[], int]) -> None:
    screen = Screen()
    engine = node("d0", "decode", free_port())
    assert supervise({engine: "raise SystemExit(7)"}, screen) == 7  # no router to wait for: ready from the start
    assert sum("restarting it" in line for line in screen.lines) == 5
    assert any("died again (exit code 7), 6 times in a minute" in line for line in screen.lines)


def test_what_outlives_its_grace_is_killed(free_port: Callable[[], int]) -> None:
    screen = Screen("up", terminate)
    assert supervise({node("d0", "decode", free_port()): STUBBORN}, screen, grace_s=0.05) == 0


def test_a_second_ctrl_c_is_passed_on_to_those_that_drain(free_port: Callable[[], int]) -> None:
    last = "print('drains', flush=True); signal.sigwait({signal.SIGTERM}); print('last words')"
    drains = ROUTER.replace("print('ended', flush=True)", last)
    programs = {node("d0", "decode", free_port()): ENGINE, node("router", "router", free_port()): drains}
    screen = Screen("drains", interrupt)
    assert supervise(programs, screen, on_ready=lambda router, view: interrupt(), grace_s=1000.0) == 130
    assert [line for line in screen.lines if not line.endswith(" up")] == ["[router] drains", "[router] last words", "[d0] ended"]


@pytest.mark.parametrize(("signals", "last_grace_s"), [(2, 0.01), (3, 1000.0)])
def test_what_outlives_a_second_ctrl_c_is_killed_soon_and_by_a_third_at_once(
    free_port: Callable[[], int], signals: int, last_grace_s: float
) -> None:
    def again() -> None:
        for number in range(signals):
            asyncio.get_running_loop().call_later(0.01 * number, interrupt)

    programs = {node("d0", "decode", free_port()): STUBBORN}
    assert supervise(programs, Screen("up", again), grace_s=1000.0, last_grace_s=last_grace_s) == 130


def test_no_node_survives_a_kill_of_its_supervisor(free_port: Callable[[], int]) -> None:
    program = (
        "import asyncio, sys\n"
        "from disaggd.config import NodeConfig\n"
        "from disaggd.units import Address\n"
        "from disaggd.supervisor import Supervisor\n"
        f"node = NodeConfig(name='d0', role='decode', listen=Address('127.0.0.1:{free_port()}'))\n"
        "child = [sys.executable, '-I', '-S', '-c', 'import os, signal; print(os.getpid(), flush=True); signal.pause()']\n"
        "asyncio.run(Supervisor((node,), lambda _: child, lambda *_: None, out=sys.stdout).run())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as up:
        assert up.stdout is not None
        child = os.pidfd_open(int(up.stdout.readline().removeprefix("[d0] ")))
        up.kill()
        assert select.select([child], [], [], 20.0)[0] == [child]  # readable: the process has ended
        os.close(child)


def test_a_taken_port_is_found_before_anything_starts(free_port: Callable[[], int]) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"node 'd0': 127.0.0.1:{port} is in use by another process"):
            check_ports([node("d0", "decode", port)])
    check_ports([node("d0", "decode", port)])


def test_nodes_of_other_hosts_are_left_to_them(free_port: Callable[[], int]) -> None:
    here = node("d0", "decode", free_port())
    elsewhere = NodeConfig(name=NodeName("d1"), role="decode", listen=Address("192.0.2.7:8101"))
    assert local_nodes([here, elsewhere]) == (here,)
    with pytest.raises(ConfigError, match="no node of the file listens on an address of this host"):
        local_nodes([elsewhere])


def test_who_is_ready_is_asked_of_the_router(free_port: Callable[[], int]) -> None:
    router = node("router", "router", free_port())
    told: list[tuple[NodeConfig, ClusterView | None]] = []

    def on_ready(router: NodeConfig, view: ClusterView | None) -> None:
        told.append((router, view))
        terminate()

    assert supervise({router: ROUTER}, Screen(), on_ready) == 0
    assert told == [(router, WHOLE)]


def test_nodes_that_still_load_are_waited_for(free_port: Callable[[], int], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    engine = node("d0", "decode", free_port())
    programs = {
        node("router", "router", free_port()): ROUTER.replace("client.recv(4096)", "client.recv(4096), print('asked', flush=True)"),
        engine: f"open({str(gate)!r}).close()\n" + ENGINE,
    }
    opened: list[int] = []

    def load_soon() -> None:
        asyncio.get_running_loop().call_later(0.3, lambda: opened.append(os.open(gate, os.O_RDWR)))

    def on_ready(router: NodeConfig, view: ClusterView | None) -> None:
        socket.create_connection((engine.listen.host, engine.listen.port)).close()
        assert view == WHOLE
        terminate()

    assert supervise(programs, Screen("asked", load_soon), on_ready) == 0
    os.close(opened[0])


def test_a_node_that_loads_for_long_is_shown_as_loading(free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disaggd.supervisor.LOADING_PATIENCE_S", 0.0)
    told: list[ClusterView | None] = []

    def on_ready(router: NodeConfig, view: ClusterView | None) -> None:
        told.append(view)
        terminate()

    programs = {node("router", "router", free_port()): ROUTER, node("p0", "prefill", free_port()): BLOCKED + WAIT}
    no_p0 = ClusterView((msgspec.structs.replace(WHOLE.nodes[0], link="down"), WHOLE.nodes[1]))
    assert supervise(programs, Screen(), on_ready, view=no_p0) == 0
    [view] = told
    assert view is not None and view.missing == ["p0 (still loading)"]


def test_a_node_that_has_loaded_and_is_not_linked_is_waited_for_and_then_missed(
    free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disaggd.supervisor.LINKING_PATIENCE_S", 0.3)
    told: list[ClusterView | None] = []
    screen = Screen()

    def on_ready(router: NodeConfig, view: ClusterView | None) -> None:
        told.append(view)
        terminate()

    router = ROUTER.replace("client.recv(4096)", "print(client.recv(4096).split()[1].decode(), flush=True)")
    programs = {node("router", "router", free_port()): router, node("p0", "prefill", free_port()): ENGINE}
    no_p0 = ClusterView((msgspec.structs.replace(WHOLE.nodes[0], link="down"), WHOLE.nodes[1]))
    assert supervise(programs, screen, on_ready, view=no_p0) == 0
    assert told == [no_p0]
    assert screen.lines.count("[router] /v1/cluster") > 1


def test_a_router_with_tls_and_keys_is_asked_over_tls_whether_it_is_ready_and_nothing_else(
    free_port: Callable[[], int], tmp_path: Path
) -> None:
    made = make_certificates(tmp_path)
    tls = (
        "import ssl\ntls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
        f"tls.load_cert_chain({made.path('router.pem')!r}, {made.path('router.key')!r})\n"
        "server = tls.wrap_socket(server, server_side=True)\ndef answer("
    )
    program = ROUTER.replace("def answer(", tls).replace("client.recv(4096)", "print(client.recv(4096).split()[1].decode(), flush=True)")
    told: list[ClusterView | None] = []

    def on_ready(_: NodeConfig, view: ClusterView | None) -> None:
        told.append(view)
        terminate()

    screen = Screen()
    assert supervise({node("router", "router", free_port()): program}, screen, on_ready, tls=True, has_keys=True) == 0
    assert told == [None]
    assert {line for line in screen.lines if "/" in line} == {"[router] /ready"}


CONFIG = parse_config(
    '[cluster]\nsecret = "0123456789abcdef"\n'
    '[[node]]\nname = "router"\nrole = "router"\nlisten = "0.0.0.0:9000"\n'
    '[[node]]\nname = "p0"\nrole = "prefill"\nlisten = "10.0.0.1:8101"\n'
    '[[node]]\nname = "d0"\nrole = "decode"\nlisten = "10.0.0.2:8101"\n'
)


def test_the_banner_shows_a_curl_line_for_this_cluster() -> None:
    text = banner(CONFIG, CONFIG.node("router"), WHOLE)
    assert "Ready: tiny on 1 router, 1 prefill, 1 decode." in text
    assert "curl -N http://127.0.0.1:9000/v1/completions" in text


def test_the_banner_of_a_router_with_keys_and_tls_says_what_a_client_needs() -> None:
    router = msgspec.structs.replace(CONFIG.router, api_keys="keys.toml", tls_cert="a.pem", tls_key="a.key")
    text = banner(msgspec.structs.replace(CONFIG, router=router), CONFIG.node("router"), None)
    assert "Ready: tiny on 1 router, 1 prefill, 1 decode." in text
    assert "curl -N https://127.0.0.1:9000/v1/completions" in text and " --cacert … -H 'authorization: Bearer …'" in text


def test_the_banner_says_what_is_missing() -> None:
    no_p0 = ClusterView((msgspec.structs.replace(WHOLE.nodes[0], link="down"), WHOLE.nodes[1]))
    text = banner(CONFIG, CONFIG.node("router"), no_p0)
    assert "Ready, but \x1b[33mwithout p0 (no link to 10.0.0.1:8101)\x1b[0m: tiny on 1 router, 0 of 1 prefill, 1 decode." in text
    no_path = msgspec.structs.replace(WHOLE, pairs=(LinkedPair("p0", "d0", "probing"),))
    assert "without p0 → d0 (KV path probing)" in banner(CONFIG, CONFIG.node("router"), no_path)


def test_a_child_is_this_package_under_the_same_interpreter() -> None:
    command = node_command(Path("/etc/cluster.toml"))(node("p0", "prefill", 8101))
    assert command == [sys.executable, "-P", "-m", "disaggd", "--role", "prefill", "--name", "p0", "--config", "/etc/cluster.toml"]


def test_a_folder_called_disaggd_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disaggd").mkdir()
    (tmp_path / "disaggd" / "__main__.py").write_text("raise SystemExit('the wrong disaggd')")
    monkeypatch.chdir(tmp_path)
    screen = Screen()
    supervisor = Supervisor((node("router", "router", 1),), node_command(Path("absent.toml")), lambda *_: None, out=screen)
    assert asyncio.run(supervisor.run()) == 2
    assert "[router] disaggd: absent.toml: no such file (name one with --config or $DISAGGD_CONFIG)" in screen.lines
