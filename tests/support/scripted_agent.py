"""`ScriptedAgent`: stands where an `Agent` stands, records what it is asked, and moves nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field

from disaggd.ids import AgentId, HandleId
from disaggd.transfer.agent import PeerLost
from disaggd.transfer.notification import AnyNotification, decode, encode
from disaggd.transfer.pool import Descriptors, Indices
from tests.support.endpoints import PORT


@dataclass
class ScriptedPort:
    number: int = PORT
    is_released: bool = False

    def release(self) -> None:
        self.is_released = True


@dataclass
class ScriptedAgent:
    agent_id: AgentId
    port: ScriptedPort = field(default_factory=ScriptedPort)
    arriving: list[bytes] = field(default_factory=list)
    sent: list[AnyNotification | None] = field(default_factory=list)
    sent_to: list[AgentId] = field(default_factory=list)
    """Whom each of those."""
    done: set[HandleId] = field(default_factory=set)
    is_lost: bool = False
    on_connect: Callable[[], object] = lambda: None
    is_destroyed: bool = False
    on_prepare: Callable[[], None] = lambda: None
    """What happens to the writer between the preparation of a write and its post."""
    _prepared: tuple[AgentId, AnyNotification | None] | None = None

    @property
    def metadata(self) -> bytes:
        return b"metadata of " + self.agent_id.encode()

    def arrive(self, *notifications: AnyNotification) -> None:
        self.arriving += map(encode, notifications)

    def notifications(self) -> list[bytes]:
        arrived, self.arriving = self.arriving, []
        return arrived

    def connect(self, agent_id: AgentId, metadata: bytes, sources: Descriptors, targets: Descriptors) -> None:
        self.on_connect()
        self._reach()

    def notify(self, agent_id: AgentId, message: bytes) -> None:
        self._reach()
        self.sent.append(decode(message))
        self.sent_to.append(agent_id)

    def prepare(self, agent_id: AgentId, sources: Indices, targets: Indices, message: bytes) -> HandleId:
        """Handles are numbered by their place in `sent`: what is prepared is posted or discarded before anything else is sent."""
        assert not self.is_destroyed and self._prepared is None
        self._prepared = (agent_id, decode(message))
        self.on_prepare()
        return HandleId(len(self.sent))

    def post(self, handle: HandleId) -> None:
        assert handle == len(self.sent) and self._prepared is not None
        (agent_id, prepared), self._prepared = self._prepared, None
        self._reach()
        self.sent.append(prepared)
        self.sent_to.append(agent_id)

    def discard(self, handle: HandleId) -> None:
        assert handle == len(self.sent) and self._prepared is not None
        self._prepared = None

    def poll(self, handle: HandleId) -> bool:
        self._reach()
        return handle in self.done

    def destroy(self) -> None:
        assert not self.is_destroyed
        self.is_destroyed = True

    def _reach(self) -> None:
        assert not self.is_destroyed
        if self.is_lost:
            raise PeerLost("gone")
