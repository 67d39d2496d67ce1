"""One engine node without threads, sockets or NIXL: a test scripts frames, transfer events, steps and time in any order."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from disaggd.cluster.protocol import ToNode, ToRouter
from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine
from disaggd.engine.scheduler import Limits, StepPlan
from disaggd.ids import BlockId
from disaggd.prefix import PrefixHasher
from disaggd.roles.compute import LinkId, Outbox, Role
from disaggd.roles.pushing import Pushing
from disaggd.sampling import TokenLogprob
from disaggd.transfer.layout import KVGroup, KVSpec
from disaggd.transfer.messages import TransferCommand, TransferEvent

BLOCK = 4
VOCAB = 97
LINK = LinkId(1)
VOCAB_SIZE = 1000
LEASE_S = 5.0
QUIESCE_S = 10.0
BYTES_PER_TOKEN = 24
BYTES_PER_BLOCK = BYTES_PER_TOKEN * BLOCK
LAYER_GROUPS = (range(0, 2), range(2, 3))


def kv_of(block_size: int = BLOCK) -> KVSpec:
    """Of a model of three layers."""
    return KVSpec(dtype="float32", block_size=block_size, head_dim=1, groups=(KVGroup(layers=3, kv_heads=1, head_bytes=8 * block_size),))


def hasher_of(block_size: int = BLOCK) -> PrefixHasher:
    return PrefixHasher("model", "float32", block_size)


KV, HASHER = kv_of(), hasher_of()

Submit = Callable[[TransferCommand], None]
Clock = Callable[[], float]

F = TypeVar("F", bound=ToRouter)
C = TypeVar("C", bound=TransferCommand)
R = TypeVar("R", bound=Role)


class Drawn(NamedTuple):
    token: int
    logprob: TokenLogprob | None


def next_token(context: list[int]) -> int:
    """What the stand-in for the model samples after `context`."""
    word = 0
    for token in context:
        word = (word * 1_000_003 + token + 1) % 2_147_483_647
    return word % VOCAB


class FakeRunner:
    """Computes nothing; calls back for two layer groups, as a model of three layers would."""

    lookahead = 0

    def execute(self, plan: StepPlan, layers_done: Callable[[range], None] | None) -> Callable[[], list[Drawn]]:
        assert layers_done is not None
        for layers in LAYER_GROUPS:
            layers_done(layers)
        drawn = [Drawn(next_token(chunk.sequence.tokens), None) for chunk in plan.sampling]
        return lambda: drawn


class RoleNode(Generic[R]):
    """A role with a real engine and one router's link; `sent` and `commands` are what it said since they were cleared.

    Without a `hasher` nothing is cached.
    """

    def __init__(
        self,
        make_role: Callable[[Engine, Outbox, Submit, Clock], R],
        *,
        num_blocks: int = 64,
        max_step_tokens: int = 16,
        hasher: PrefixHasher | None = None,
        block_size: int = BLOCK,
    ) -> None:
        self.now = 1000.0
        self.sent: list[tuple[LinkId, ToRouter]] = []
        self.commands: list[TransferCommand] = []
        self.engine = Engine(FakeRunner(), BlockPool(num_blocks, block_size, hasher), Limits(max_step_tokens, 8, 1000))
        self.outbox = Outbox(self.sent.extend)
        self.role = make_role(self.engine, self.outbox, self.commands.append, lambda: self.now)
        self.invariant: Callable[[], None] = lambda: None
        """Checked after everything that happens."""
        self.link_up(LINK)

    @property
    def pool(self) -> BlockPool:
        return self.engine.pool

    @property
    def running_blocks(self) -> set[BlockId]:
        """Those in tables of sequences."""
        return {block for sequence in self.engine.sequences.values() for block in sequence.block_table}

    # ── what happens to it ──

    def link_up(self, link: LinkId) -> None:
        self.outbox.links.add(link)
        self.role.link_up(link)
        self._happened()

    def link_down(self, link: LinkId = LINK) -> None:
        self.outbox.links.discard(link)
        self.role.link_down(link)
        self._happened()

    def say(self, *frames: ToNode, link: LinkId = LINK) -> None:
        for frame in frames:
            self.role.on_frame(link, frame)
            self._happened()

    def event(self, *events: TransferEvent) -> None:
        for event in events:
            self.role.on_event(event)
            self._happened()

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.role.tick()
        self._happened()

    def step(self) -> None:
        self.role.deliver(self.engine.step(self.role.layers_done))
        self._happened()

    def run(self) -> None:
        """Steps until nothing is left to compute."""
        while self.engine.has_work:
            self.step()

    def _happened(self) -> None:
        self.outbox.flush()
        self.invariant()

    # ── what it said ──

    def frames(self, kind: type[F]) -> list[F]:
        return [frame for _, frame in self.sent if isinstance(frame, kind)]

    def last(self, kind: type[F]) -> F:
        return self.frames(kind)[-1]

    def submitted(self, kind: type[C]) -> list[C]:
        return [command for command in self.commands if isinstance(command, kind)]

    def clear(self) -> None:
        self.sent.clear()
        self.commands.clear()


def make_pushing(engine: Engine, outbox: Outbox, submit: Submit, clock: Clock) -> Pushing:
    return Pushing(
        engine.pool,
        max_write_tokens=engine.limits.max_step_tokens,
        lease_s=LEASE_S,
        quiesce_s=QUIESCE_S,
        outbox=outbox,
        submit=submit,
        clock=clock,
    )


def check_holdings(node: RoleNode[R], *states: str) -> None:
    """What is listed, block by block, is what the gauges of these states count."""
    holdings, gauges = list(node.role.holdings()), node.role.gauges()
    for state in states:
        listed = {block for holding in holdings if holding.state == state for block in holding.blocks}
        assert len(listed) == getattr(gauges, f"blocks_{state}"), state
    assert all(holding.age_s >= 0 for holding in holdings)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 31 + i * 17) % VOCAB for i in range(length)]


def expected(tokens: list[int], count: int) -> list[int]:
    """What any engine generates after `tokens`."""
    context = list(tokens)
    for _ in range(count):
        context.append(next_token(context))
    return context[len(tokens) :]
