"""`SimulatedNode`: an engine node in virtual time. The role, the engine and their turns are the real ones; computing only takes time.

A turn begins when the loop says so, and moves the node's own clock ahead of the loop's by the step that it computes. What it
sends on the way is due at the time that the node's clock then shows, so pushes overlap with computing as they do in reality;
what comes in meanwhile waits in the inbox for the next turn.
"""

from collections.abc import Callable
from collections.abc import Sequence as ReadOnlySequence

from disaggd.engine.engine import Engine, Sampled
from disaggd.engine.scheduler import StepPlan
from disaggd.engine.step_cost import load_of
from disaggd.roles.compute import Compute, LinkId, Message, Outbox, Role
from disaggd.simulator.costs import StepCosts
from disaggd.simulator.events import EventLoop
from disaggd.transfer.notification import FirstToken

LINK = LinkId(1)
"""There is one router."""

DRAWN = FirstToken(1)
"""What everybody samples: prompts are told apart by what they begin with."""


class NodeClock:
    """What the time is on one node, while its turn runs: at least as late as on the loop."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._now = 0.0
        self._debt_s = 0.0

    def __call__(self) -> float:
        return max(self._now, self._loop.now)

    def advance(self, seconds: float) -> None:
        """The node works for so long."""
        self._now = self() + seconds

    def owe(self, seconds: float) -> None:
        """The next step takes so much longer: something else has used its processor."""
        self._debt_s += seconds

    def pay(self) -> float:
        debt, self._debt_s = self._debt_s, 0.0
        return debt


class SimulatedRunner:
    """Computes nothing, and takes the time that it would take: each layer group its part, where a prompt is computed."""

    lookahead = 0

    def __init__(self, costs: StepCosts, layer_groups: ReadOnlySequence[range], clock: NodeClock) -> None:
        self._costs = costs
        self._groups = layer_groups
        self._all_layers = [range(layer_groups[-1].stop)]
        self._clock = clock

    def execute(self, plan: StepPlan, layers_done: Callable[[range], None] | None) -> Callable[[], ReadOnlySequence[Sampled]]:
        """See `engine.Runner`."""
        load = load_of(plan)
        step_s = self._costs.step_s(load) + self._clock.pay()
        groups = self._groups if load.prefill_tokens else self._all_layers  # nothing of a decode step is pushed
        for layers in groups:
            self._clock.advance(step_s * len(layers) / groups[-1].stop)
            if layers_done is not None:
                layers_done(layers)
        drawn = [DRAWN] * len(plan.sampling)
        return lambda: drawn


class SimulatedNode:
    """One engine node. What it sends is due at the time that its clock shows."""

    def __init__(self, loop: EventLoop, clock: NodeClock, engine: Engine, role: Role, outbox: Outbox) -> None:
        self.engine = engine
        self._loop = loop
        self._clock = clock
        self._compute = Compute(engine, role, outbox, clock)
        self._inbox: list[Message] = []
        self._turn_at: float | None = None

    def receive(self, message: Message) -> None:
        """At the loop's time; read in the next turn."""
        self._inbox.append(message)
        self._wake(self._clock())

    def _wake(self, at: float) -> None:
        """Have a turn at `at`, or before if there is one before."""
        if self._turn_at is None or at < self._turn_at:
            self._turn_at = at
            self._loop.at(at, lambda: self._turn_if(at))

    def _turn_if(self, at: float) -> None:
        if self._turn_at == at:  # else an earlier one has taken its place, and said when the next is due
            self._turn_at = None
            self._turn()

    def _turn(self) -> None:
        messages, self._inbox = self._inbox, []
        for message in messages:
            self._compute.handle(message)
        self._compute.turn()
        if self._compute.has_work:
            self._wake(self._clock())
        elif (deadline := self._compute.next_deadline()) is not None:
            self._wake(max(deadline, self._clock()))
