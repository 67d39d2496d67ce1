"""Which cuts the log tells of."""

import pytest
from prometheus_client import CollectorRegistry

from disaggd.gateway.cuts import Cuts
from disaggd.observe.metrics import Metrics


@pytest.fixture
def cuts() -> Cuts:
    return Cuts(Metrics(CollectorRegistry()))


def test_each_client_and_each_reason_is_told_at_once(cuts: Cuts, caplog: pytest.LogCaptureFixture) -> None:
    cuts.slow("stalled", "10.0.0.1", 0.0, "a")
    cuts.slow("stalled", "10.0.0.2", 0.1, "b")
    cuts.slow("head", "10.0.0.1", 0.2)
    assert caplog.messages == [
        "cut a client that does not read: 10.0.0.1 (request a)",
        "cut a client that does not read: 10.0.0.2 (request b)",
        "cut a client that sent no request in time: 10.0.0.1",
    ]


def test_what_the_same_client_does_again_is_told_in_one_line_per_ten_seconds(cuts: Cuts, caplog: pytest.LogCaptureFixture) -> None:
    for now_s in (0.0, 1.0, 9.9, 10.0, 10.1, 30.0):
        cuts.refused("malformed", "10.0.0.1", now_s)
    line = "cut a client that does not speak HTTP: 10.0.0.1"
    assert caplog.messages == [line, f"{line}; 2 more since this was last said", f"{line}; 1 more since this was last said"]


def test_of_many_clients_the_one_told_longest_ago_is_forgotten(cuts: Cuts, caplog: pytest.LogCaptureFixture) -> None:
    for client in range(1001):
        cuts.slow("head", str(client), 0.0)
    caplog.clear()
    for client in (1000, 1, 0):
        cuts.slow("head", str(client), 1.0)
    assert caplog.messages == ["cut a client that sent no request in time: 0"]
