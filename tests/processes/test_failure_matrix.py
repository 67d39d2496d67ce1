"""Nothing is lost: whoever breaks, however, and whenever, each client has the oracle's tokens, or an end that the matrix allows.

One cluster and one blow serve many cells: the requests of a scene are in different phases when the blow falls. `tests/support/matrix.py`
says what may break, and what clients may see of it; `tests/support/scenes.py` how phases are reached.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import pytest

from tests.support.answers import Answers, Stream, contradiction
from tests.support.clusters import running
from tests.support.matrix import BLOWS, PHASES, Blow, Phase, allowed, may_move, must_move
from tests.support.oracle import Oracle
from tests.support.scenes import DEFAULT, QUICK, SceneCluster, Stage, Tempo
from tests.support.territory import Wire, has_namespaces, wired

pytestmark = pytest.mark.process

Act = Literal["early", "late"]
ACTS: dict[Act, tuple[Phase, ...]] = {"early": ("prefilling",), "late": tuple(phase for phase in PHASES if phase != "prefilling")}

QUICK_ONES: set[tuple[Blow, Act]] = {
    (Blow("prefill", "killed"), "late"),
    (Blow("prefill", "restarted"), "early"),
    (Blow("decode", "restarted"), "late"),
    (Blow("decode", "hangs"), "late"),
    (Blow("router", "hangs"), "late"),
    (Blow("router", "restarted"), "early"),
    (Blow("link_to_prefill", "killed"), "late"),
    (Blow("link_to_decode", "restarted"), "early"),
}
"""With all deadlines scaled down: each victim, each kind of loss, each phase. The rest of the matrix is for the night, and so are these
with the deadlines that users have."""


@dataclass
class Played:
    """What was seen of a scene."""

    blow: Blow
    tempo: Tempo
    streams: dict[Phase, Stream]
    receipts: dict[Phase, dict[str, Any]]
    """Of those that the router still knows."""


class Theatre:
    """One cluster for all scenes of a tempo; a scene that goes wrong leaves the next one a new cluster."""

    def __init__(self, factory: pytest.TempPathFactory, oracle: Oracle, tempo: Tempo, wire: Wire | None = None) -> None:
        self._wire = wire
        self._factory = factory
        self._oracle = oracle
        self._tempo = tempo
        self._open = contextlib.ExitStack()
        self._set: tuple[SceneCluster, Stage] | None = None
        self._played: dict[tuple[Blow, Act], Played | Exception] = {}

    def played(self, blow: Blow, act: Act) -> Played:
        """A scene is played once, for all of its cells. Raises when a client had no answer, or something did not heal."""
        if (blow, act) not in self._played:
            try:
                self._played[blow, act] = self._play(blow, act)
            except (AssertionError, TimeoutError, RuntimeError, httpx.HTTPError) as error:
                self._played[blow, act] = error
        played = self._played[blow, act]
        if isinstance(played, Exception):
            raise played
        return played

    def _play(self, blow: Blow, act: Act) -> Played:
        cluster, stage = self._set = self._set or self._build()
        try:
            scene = stage.early() if act == "early" else stage.late()
            stage.strike(scene, blow)
            receipts = {phase: receipt for phase, stream in scene.streams.items() if (receipt := stage.receipt(stream)) is not None}
            stage.repair()
            assert [name for name in cluster.nodes if not cluster.is_running(name)] == []
            assert [name for name in cluster.nodes if "Traceback" in cluster.log(name).read_text()] == []
        except BaseException:
            print(*(cluster.tail(name) for name in cluster.nodes), sep="\n")
            self.close()
            raise
        return Played(blow, self._tempo, scene.streams, receipts)

    def _build(self) -> tuple[SceneCluster, Stage]:
        cluster = self._open.enter_context(running(SceneCluster(self._factory.mktemp("scenes"), self._oracle, self._tempo, self._wire)))
        limits = httpx.Limits(max_keepalive_connections=1)
        http = self._open.enter_context(httpx.Client(base_url=cluster.url, timeout=60, limits=limits))
        return cluster, Stage(cluster, self._oracle, self._tempo, http)

    def close(self) -> None:
        self._set = None
        self._open.close()


@pytest.fixture(scope="module")
def answers(oracle: Oracle) -> Answers:
    return Answers(oracle)


def opened(factory: pytest.TempPathFactory, oracle: Oracle, tempo: Tempo, wire: Wire | None = None) -> Iterator[Theatre]:
    made = Theatre(factory, oracle, tempo, wire)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def quick_theatre(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Iterator[Theatre]:
    yield from opened(tmp_path_factory, oracle, QUICK)


@pytest.fixture(scope="module")
def nightly_theatre(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Iterator[Theatre]:
    yield from opened(tmp_path_factory, oracle, DEFAULT)


@pytest.fixture(scope="module")
def wired_theatre(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Iterator[Theatre]:
    with wired() as wire:
        yield from opened(tmp_path_factory, oracle, DEFAULT, wire)


def cells(chosen: set[tuple[Blow, Act]]) -> list[Any]:
    """The cells of one scene beside each other."""
    scenes = [(blow, act) for blow in BLOWS for act in ACTS if (blow, act) in chosen]
    return [pytest.param(blow, act, phase, id=f"{blow.title}-{phase}") for blow, act in scenes for phase in ACTS[act]]


@pytest.mark.parametrize(("blow", "act", "phase"), cells(QUICK_ONES))
def test_nothing_is_lost(quick_theatre: Theatre, answers: Answers, blow: Blow, act: Act, phase: Phase) -> None:
    check(quick_theatre.played(blow, act), phase, answers)


@pytest.mark.nightly
@pytest.mark.parametrize(("blow", "act", "phase"), cells({(blow, act) for blow in BLOWS if blow.victim != "wire" for act in ACTS}))
def test_nothing_is_lost_by_the_deadlines_that_users_have(
    nightly_theatre: Theatre, answers: Answers, blow: Blow, act: Act, phase: Phase
) -> None:
    check(nightly_theatre.played(blow, act), phase, answers)


@pytest.mark.nightly
@pytest.mark.skipif(not has_namespaces(), reason="network namespaces want root, ip and tc")
@pytest.mark.parametrize(("blow", "act", "phase"), cells({(blow, act) for blow in BLOWS if blow.victim == "wire" for act in ACTS}))
def test_nothing_is_lost_on_the_wire(wired_theatre: Theatre, answers: Answers, blow: Blow, act: Act, phase: Phase) -> None:
    check(wired_theatre.played(blow, act), phase, answers)


def check(played: Played, phase: Phase, answers: Answers) -> None:
    stream = played.streams[phase]
    assert contradiction(stream, answers.to(stream.ask)) is None
    assert stream.end in allowed(played.blow), f"{stream.end} after {stream.num_tokens} tokens: {stream.note}"
    if (receipt := played.receipts.get(phase)) is not None:
        attempts = [(attempt["decode_node"], attempt["prefill_node"], attempt["failure"]) for attempt in receipt["attempts"]]
        assert len(attempts) > 1 or not must_move(played.blow, phase), f"the blow hit nothing: {attempts}"
        may_be_lost = may_move(played.blow) or (played.blow.fault == "blinks" and played.tempo.may_lose_who_blinks)
        assert len(attempts) == 1 or may_be_lost, f"nothing was lost, and yet: {attempts}"
