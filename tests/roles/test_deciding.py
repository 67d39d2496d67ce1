"""What a decode node knows of itself when it decides."""

from disaggd.cluster.decision import DecisionRule
from disaggd.cluster.protocol import Generate, pack_tokens
from disaggd.engine.blocks import BlockPool
from disaggd.engine.engine import Engine
from disaggd.engine.scheduler import Limits
from disaggd.engine.sequence import Sequence
from disaggd.engine.step_cost import ENOUGH, BegunStep, StepLoad, StepPace
from disaggd.ids import SeqId
from disaggd.roles.deciding import Decider
from disaggd.sampling import SamplingParams
from tests.support.role_nodes import LINK, FakeRunner, prompt

S = SeqId("s")
GREEDY = SamplingParams(max_tokens=4)


class Node:
    """An engine that runs one sequence, and a clock for its steps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.engine = Engine(FakeRunner(), BlockPool(16, 4), Limits(16, 8, 100), pace=StepPace(None, lambda: self.now))
        self.decider = Decider(DecisionRule(policy="adaptive"), self.engine, max_remote_tokens=None, bytes_per_token=1.0)
        self.engine.add(Sequence(SeqId("running"), prompt(4), GREEDY, 4))
        self.engine.step(lambda plan, layers: None)

    def steps(self, count: int, seconds: float, load: StepLoad) -> None:
        for _ in range(count):
            begun = BegunStep(load, self.now)
            self.now += seconds
            self.engine.pace.settled(begun)

    def breaks_itl(self, itl_target_s: float) -> bool:
        """Whether a prompt here would make the steps of the running sequence too long."""
        self.engine.pace.itl_target_s = itl_target_s
        local = self.decider._local(0, now=0.0)
        assert local is not None
        return local.breaks_itl

    def predicts(self) -> float | None:
        frame = Generate(S, 0, pack_tokens(prompt(8)), 8, GREEDY, "", "auto", 1.0, None)
        return self.decider.decide(Sequence(S, prompt(8), GREEDY, 8), 0, frame, LINK, 0.0)[1]


def test_a_node_that_has_only_decoded_does_not_say_what_a_prefill_takes() -> None:
    node = Node()
    node.steps(2 * ENOUGH, 0.01, StepLoad(1, 50, 0, 0.0))
    assert node.engine.pace.cost is not None
    assert node.predicts() is None


def test_a_node_that_has_prefilled_does() -> None:
    node = Node()
    node.steps(2 * ENOUGH, 0.01, StepLoad(1, 50, 0, 0.0))
    node.steps(2 * ENOUGH, 0.03, StepLoad(0, 0, 20, 200.0))
    assert (node.predicts() or 0.0) > 0.005


def test_prompts_break_a_target_that_the_least_of_a_step_does_not_fit_under() -> None:
    node = Node()
    for _ in range(4 * ENOUGH):
        node.steps(1, 0.010, StepLoad(1, 5, 0, 0.0))
        node.steps(1, 0.018, StepLoad(1, 5, 16, 128.0))
    assert not node.breaks_itl(0.016)
    assert node.breaks_itl(0.011), "a step carries four tokens at least, 2 ms"
    assert not node.breaks_itl(0.009), "the decodes break that by themselves"
