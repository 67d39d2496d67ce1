"""SIGTERM: streams under way are told, nothing is left behind, and no traceback frightens anyone."""

import json
import signal
import threading
from pathlib import Path

import httpx
import pytest

from tests.support.clusters import Cluster, running, wait_until
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process


def test_a_stopping_router_ends_its_streams_with_an_error_event(directory: Path, oracle: Oracle) -> None:
    with running(Cluster(directory)) as cluster:
        lines: list[str] = []

        def read() -> None:
            body = {"model": "tiny", "prompt": prompt_of(20, oracle), "max_tokens": 4000, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", cluster.url + "/v1/completions", json=body, timeout=60) as stream:
                lines.extend(line for line in stream.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        wait_until("the stream has begun", lambda: bool(cluster.blocks("used")), 20)
        cluster.kill("router", signal.SIGTERM)
        reader.join(20)
        router = cluster.nodes["router"].process
        assert router is not None and router.wait(15) == 0
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "the router is stopping"
        assert "Traceback" not in cluster.log("router").read_text()
