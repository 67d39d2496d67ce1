"""`Agent`: one NIXL agent that registers the memory which KV moves from and to; the only home of NIXL.

Made, used and destroyed by the transfer thread, but for `connect`, during which an agent is another thread's (`connecting.py`).
Agents are not thread-safe (three threads on one: SIGSEGV, measured), and without NIXL's own progress thread, which would
spin on a core, they move bytes only while `poll` and `notifications` are called, on both sides.

Of everything NIXL offers to stop a peer's writes only one thing does: destroying the agent.
"""

import uuid
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nixl._api import nixl_agent, nixl_agent_config, nixl_prepped_dlist_handle, nixl_xfer_handle
from nixl._bindings import (
    nixlBackendError,
    nixlInvalidParamError,
    nixlMismatchError,
    nixlNotAllowedError,
    nixlNotFoundError,
    nixlRemoteDisconnectError,
)

from disaggd.errors import ResourceError
from disaggd.ids import AgentId, HandleId
from disaggd.transfer.pool import Descriptors, Indices, Region
from disaggd.transfer.ports import Port, PortRange, PortsUnusable, is_free

_LINK_ERRORS = (nixlRemoteDisconnectError, nixlNotFoundError, nixlBackendError)
_METADATA_ERRORS = (*_LINK_ERRORS, nixlInvalidParamError, nixlMismatchError, nixlNotAllowedError)


class PeerLost(Exception):
    """The remote agent is out of reach, or is not the one that was asked for.

    Leave the `except` block before destroying the agent: the traceback holds references to it.
    """


class NoAgent(Exception):
    """None can be made now, as when a network device is down. It may be possible again later."""


class _Remote(NamedTuple):
    """An agent that is written to: what is read for that, and what is written there."""

    name: bytes
    sources: nixl_prepped_dlist_handle
    targets: nixl_prepped_dlist_handle


class Agent:
    """An agent with its own id and port; it can be written to, and can `connect` to remote agents and write there.

    All regions lie in the memory of their hosts (`source.py` says why): over TCP a put between those copies nothing in between.
    """

    def __init__(self, port: Port, regions: Iterable[Region]) -> None:
        self.agent_id = AgentId(uuid.uuid4().hex)
        self.port = port
        self._remotes: dict[AgentId, _Remote] = {}
        self._handles: dict[HandleId, nixl_xfer_handle] = {}
        self._num_prepared = 0
        self._nixl = nixl_agent(self.agent_id, nixl_agent_config(enable_prog_thread=False, backends=[]))
        # A range of one port: UCX raises if it is taken, where it would search a longer, exhausted range forever.
        self._nixl.create_backend("UCX", {"engine_config": f"TCP_PORT_RANGE={port.number}-{port.number}"})
        self._register(regions)

    def _register(self, regions: Iterable[Region]) -> None:
        try:
            self._nixl.register_memory([(region.address, region.num_bytes, 0, "") for region in regions], "DRAM")
        except nixlBackendError as error:
            raise ResourceError(f"NIXL cannot register the KV's memory ({error}): what it said before tells why") from error

    @property
    def metadata(self) -> bytes:
        """What a remote agent needs to connect: no secret, but whoever holds it can write this process's memory."""
        return bytes(self._nixl.get_agent_metadata())

    def connect(self, agent_id: AgentId, metadata: bytes, sources: Descriptors, targets: Descriptors) -> None:
        """Get ready to write from `sources`, which are in a region of ours, into `targets` at the remote agent. Blocks for 10-35 ms,
        or, where no answer comes, until TCP gives up.

        All that describes the agent came over the wire: NIXL refuses what it cannot read, and targets beyond the memory that is
        registered there. Raises `PeerLost`.
        """
        try:
            name: bytes = self._nixl.add_remote_agent(metadata)
            if name != agent_id.encode():
                raise PeerLost(f"agent {agent_id} was announced with the metadata of {name!r}")
            theirs = self._nixl.prep_xfer_dlist(name, targets.rows(), "DRAM")
        except _METADATA_ERRORS as error:
            raise PeerLost(f"agent {agent_id} cannot be connected to: {error}") from error
        self._remotes[agent_id] = _Remote(name, self._nixl.prep_xfer_dlist("NIXL_INIT_AGENT", sources.rows(), "DRAM"), theirs)

    def notify(self, agent_id: AgentId, message: bytes) -> None:
        """Send a connected agent a notification on its own. Raises `PeerLost`."""
        try:
            self._nixl.send_notif(self._remotes[agent_id].name, message)
        except _LINK_ERRORS as error:
            raise PeerLost(f"a notification cannot be sent: {error}") from error

    def prepare(self, agent_id: AgentId, sources: Indices, targets: Indices, message: bytes) -> HandleId:
        """Make a write of a connected agent's descriptors ready to be posted, or discarded; `message` arrives after its bytes."""
        handle_id = HandleId(self._num_prepared)
        self._num_prepared += 1
        remote = self._remotes[agent_id]
        self._handles[handle_id] = self._nixl.make_prepped_xfer("WRITE", remote.sources, sources, remote.targets, targets, message)
        return handle_id

    def post(self, handle_id: HandleId) -> None:
        """The bytes go out, and nothing but the agent's end stops them: to be polled until the write ends. Raises `PeerLost`."""
        try:
            self._nixl.transfer(self._handles[handle_id])
        except _LINK_ERRORS as error:
            raise PeerLost(f"a write cannot be posted: {error}") from error

    def discard(self, handle_id: HandleId) -> None:
        """Let go of a write that was never posted."""
        self._nixl.release_xfer_handle(self._handles.pop(handle_id))

    def poll(self, handle_id: HandleId) -> bool:
        """Whether the write has ended DONE; this is also what sends its notification. Raises `PeerLost` when it failed.

        A handle is never let go before one of the two: NIXL's release of a write in progress says it is aborted, yet
        its bytes still go out (264 MB of a reused source buffer, measured).
        """
        handle = self._handles[handle_id]
        try:
            if self._nixl.check_xfer_state(handle) == "PROC":
                return False
        except _LINK_ERRORS as error:
            raise PeerLost(f"a write failed: {error}") from error
        self._nixl.release_xfer_handle(self._handles.pop(handle_id))
        return True

    def notifications(self) -> list[bytes]:
        """What has come in since the last call, in no order; also what makes incoming bytes land."""
        by_sender: dict[str, list[bytes]] = self._nixl.get_new_notifs()
        return [message for messages in by_sender.values() for message in messages]

    def destroy(self) -> None:
        """The fence, in 2-24 ms: after it nothing that a peer sent or sends lands, and nothing of ours leaves.

        Its port stays leased. Only dropping every reference to the agent destroys it; one forgotten reference would
        leave the door open, hence the assertion.
        """
        gone = weakref.ref(self._nixl.agent)
        self._handles.clear()
        self._remotes.clear()
        del self._nixl
        assert gone() is None, f"agent {self.agent_id} is still referenced: it is not fenced"


class AgentMaker:
    """Makes agents, each on a free port of `ports`.

    Where NIXL cannot start for the first of them, the node is set up wrongly, and had better say so and end; unless `is_patient`: a network
    device is down. Those after it are for peers that came back or were fenced, and the node goes on without them for so long. So it does
    when its ports are used up, or the files that it may open: routers say which peers there are, and how often they were restarted.
    """

    def __init__(self, ports: PortRange, is_patient: Callable[[], bool] = lambda: False) -> None:
        self._ports = ports
        self._is_patient = is_patient
        self._has_made_one = False

    def __call__(self, regions: Iterable[Region]) -> Agent:
        """One that registers `regions`. Raises `NoAgent` if NIXL cannot start for it, or no port can be had, but this may pass; else
        `ResourceError`."""
        try:
            agent = self._make(regions)
        except PortsUnusable as error:
            raise self._failed(str(error)) from error
        self._has_made_one = True
        return agent

    def _make(self, regions: Iterable[Region]) -> Agent:
        for port in self._ports.leases():
            try:
                return Agent(port, regions)
            except nixlBackendError as error:
                port.release()
                if is_free(port.number):
                    raise self._failed(f"NIXL cannot start its UCX backend ({error}): check [transfer] devices and transports") from error
        raise self._failed(str(self._ports.exhausted()))

    def _failed(self, message: str) -> Exception:
        return NoAgent(message) if self._has_made_one or self._is_patient() else ResourceError(message)
