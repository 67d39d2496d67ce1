"""A node's part in the checks of its pairs, for scripted roles: what stands where the memory of the pool is."""

from collections.abc import Callable, Mapping, Sequence

from disaggd.engine.engine import Engine
from disaggd.ids import BlockId, NodeName
from disaggd.roles.compute import Outbox
from disaggd.roles.landing import Landings
from disaggd.roles.pair_check import PairCheck
from disaggd.roles.pattern_intake import PatternIntake
from disaggd.roles.pattern_pushes import PatternPushes, WayOut
from disaggd.roles.pushing import Pushing
from disaggd.transfer import messages as transfer
from disaggd.transfer.pattern import Mismatch
from tests.support.role_nodes import LAYER_GROUPS, LEASE_S, QUIESCE_S, Clock, Submit

WRONG = Mismatch(num_wrong=3, num_compared=100, heads=(1,), layer=2, head=1, values=True, token=5, dim=0, found=0.0, expected=7.0)


class FakePatterns:
    """Fills nothing, and finds what the test says."""

    def __init__(self) -> None:
        self.filled: list[tuple[tuple[BlockId, ...], int]] = []
        """Blocks and salts, in order."""
        self.compared: list[tuple[tuple[BlockId, ...], int, int]] = []
        """Blocks, tokens and salts, in order."""
        self.finds: list[Mismatch | None] = [None]
        """By rank."""

    def fill(self, blocks: Sequence[BlockId], salt: int) -> None:
        self.filled.append((tuple(blocks), salt))

    def compare(self, blocks: Sequence[BlockId], num_tokens: int, salt: int) -> list[Mismatch | None]:
        self.compared.append((tuple(blocks), num_tokens, salt))
        return self.finds


def make_pair_check(
    name: NodeName,
    engine: Engine,
    *,
    patterns: FakePatterns,
    pushing: Pushing,
    landings: Landings,
    agents: Mapping[NodeName, transfer.PairOpened],
    outbox: Outbox,
    submit: Submit,
    clock: Clock,
    mark: Callable[[], transfer.IsReady] = lambda: transfer.at_once,
) -> PairCheck:
    intake = PatternIntake(
        name,
        engine,
        patterns=patterns,
        landings=landings,
        agents=agents,
        lease_s=LEASE_S,
        quiesce_s=QUIESCE_S,
        outbox=outbox,
        submit=submit,
        clock=clock,
    )
    way = WayOut(transport="tcp over lo", layer_groups=LAYER_GROUPS)
    pushes = PatternPushes(name, engine, patterns=patterns, pushing=pushing, way=way, outbox=outbox, mark=mark)
    return PairCheck(intake, pushes, pushing)
