"""`disaggd doctor` against a router that answers what a test says: what it prints, and how it ends."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from disaggd import cli, doctor
from disaggd.observe.checkup import Checkup, NodeCheck, RankWay, WayCheck
from tests.support.fake_router import FakeRouter, fake_router

NODES = (
    NodeCheck(name="p0", role="prefill", listen="10.0.0.1:8101", link="up"),
    NodeCheck(name="d0", role="decode", listen="10.0.0.2:8101", link="up"),
)
DOWN = NodeCheck(name="d1", role="decode", listen="10.0.0.3:8101", link="down", reason="it serves another model")


def rank(writer: int = 0, target: int = 0, wrong: str = "") -> RankWay:
    return RankWay(
        writer_rank=writer,
        target_rank=target,
        transport="tcp over eth0",
        path="direct",
        kv_bytes=1 << 20,
        rounds=20,
        gb_per_s=1.234,
        p99_ms=5.678,
        wrong=wrong,
    )


GOOD = WayCheck(writer="p0", target="d0", verdict="ok", ranks=(rank(),))


def checkup(*ways: WayCheck, nodes: tuple[NodeCheck, ...] = NODES) -> Checkup:
    ok = all(way.verdict == "ok" for way in ways) and all(node.link == "up" for node in nodes)
    return Checkup(model="tiny", router="r0", ok=ok, took_s=1.26, nodes=nodes, ways=ways)


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with fake_router() as fake:
        yield fake


class Examined:
    """What `disaggd doctor` printed of a router's answer, and its exit code."""

    def __init__(self, router: FakeRouter, capsys: pytest.CaptureFixture[str], answer: Checkup, *arguments: str) -> None:
        router.answers["/v1/cluster/check"] = (200, msgspec.json.encode(answer))
        self.code = cli._run(["doctor", "--url", router.url, *arguments])
        self.out, self.err = capsys.readouterr()
        self.rows = [line.split() for line in self.out.splitlines() if " → " in line and ":" not in line]


def test_a_healthy_cluster_has_a_row_for_each_pair_of_ranks(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = (rank(0, 0), rank(0, 1), rank(1, 2), rank(1, 3))
    examined = Examined(router, capsys, checkup(msgspec.structs.replace(GOOD, ranks=ranks)))
    assert router.asked == ["POST /v1/cluster/check"]
    assert examined.code == 0
    cells = ["tcp", "over", "eth0", "direct", "1.234", "5.68", "ok"]
    assert examined.rows == [["p0", "d0", str(one.writer_rank), "→", str(one.target_rank), *cells] for one in ranks]
    assert examined.out.splitlines()[-1] == "2 nodes and 1 way of KV, checked in 1.3 s: all is well"
    assert "\x1b" not in examined.out


def test_what_is_wrong_is_said_of_the_ranks_between_which_it_is(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = (rank(), rank(1, 0, wrong="3 numbers differ"))
    wrong = WayCheck(writer="p0", target="d0", verdict="wrong", reason="3 numbers differ", ranks=ranks)
    examined = Examined(router, capsys, checkup(wrong))
    assert examined.code == 1
    assert [row[-1] for row in examined.rows] == ["ok", "bytes"]
    assert "p0 → d0: wrong bytes: 3 numbers differ" in examined.out
    assert examined.out.splitlines()[-1] == "1 of 1 way of KV not as it should be, checked in 1.3 s; the cluster serves with the rest"


@pytest.mark.parametrize(
    ("verdict", "words"), [("failed", "failed"), ("unchecked", "not checked"), ("unreachable", "unreachable"), ("refused", "refused")]
)
def test_a_way_that_nothing_went_over_has_a_row_and_its_reason(
    router: FakeRouter, capsys: pytest.CaptureFixture[str], verdict: str, words: str
) -> None:
    way = WayCheck(writer="p0", target="d0", verdict=verdict, reason="such is life")  # type: ignore[arg-type]
    examined = Examined(router, capsys, checkup(way))
    assert examined.code == 1
    assert f"p0 → d0: {words}: such is life" in examined.out
    assert any(line.split() == ["p0", "d0", *words.split()] for line in examined.out.splitlines())


def test_a_node_without_a_link_is_named_with_the_cause(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    examined = Examined(router, capsys, checkup(GOOD, nodes=(*NODES, DOWN)))
    assert examined.code == 1
    assert "d1 (decode, 10.0.0.3:8101): no link: it serves another model" in examined.out
    assert examined.out.splitlines()[-1].startswith("1 of 3 nodes without a link, checked")


@pytest.mark.parametrize(
    ("name", "words"), [("p0", "the cluster serves with the rest"), ("d0", "no decode node is left, and the cluster serves nothing")]
)
def test_without_a_decode_node_it_does_not_say_that_the_cluster_serves(
    router: FakeRouter, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    nodes = tuple(msgspec.structs.replace(node, link="down", reason="gone") if node.name == name else node for node in NODES)
    examined = Examined(router, capsys, checkup(nodes=nodes))
    assert examined.out.splitlines()[-1] == f"1 of 2 nodes without a link, checked in 1.3 s; {words}"


def test_on_a_narrow_terminal_names_give_way_and_neither_figures_nor_verdicts(
    router: FakeRouter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_PIPED_WIDTH", 100)
    devices = ",".join(f"mlx5_{number}:1" for number in range(8))
    one = msgspec.structs.replace(rank(10, 11), transport=f"rc,cuda_copy over {devices}", path="repacked", p99_ms=1234.5)
    way = WayCheck(writer="prefill-host-01", target="decode-host-07", verdict="unreachable", reason="no answer", ranks=(one,))
    examined = Examined(router, capsys, checkup(way))
    assert max(map(len, examined.out.splitlines()[:-2])) <= 100
    assert all(cell in examined.out for cell in ("10 → 11", "repacked", "1.234", "1234.50", " unreachable "))


def test_as_json_it_is_what_the_router_answered(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    answer = checkup(GOOD)
    examined = Examined(router, capsys, answer, "--json")
    assert examined.code == 0
    assert msgspec.convert(json.loads(examined.out), Checkup) == answer


def test_a_key_from_a_file_is_sent_along(router: FakeRouter, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-disaggd-abc\n")
    Examined(router, capsys, checkup(GOOD), "--key-file", str(tmp_path / "key"))
    assert router.keys == ["Bearer sk-disaggd-abc"]


def test_where_no_router_runs_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_router() as router:
        url = router.url
    assert cli._run(["doctor", "--url", url]) == 3
    assert capsys.readouterr().err == f"disaggd: no router at {url}: Connection refused\n"


def test_an_older_router_is_told_from_none(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["doctor", "--url", router.url]) == 1
    assert "older" in capsys.readouterr().err


def test_without_a_url_the_file_says_which_router(router: FakeRouter, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    nodes = [("router", router.url.removeprefix("http://")), ("decode", "127.0.0.1:8102")]
    config.write_text("".join(f'[[node]]\nname = "{role}"\nrole = "{role}"\nlisten = "{listen}"\n' for role, listen in nodes))
    router.answers["/v1/cluster/check"] = (200, msgspec.json.encode(checkup(GOOD)))
    assert cli._run(["doctor", "--config", str(config)]) == cli._run(["--config", str(config), "doctor"]) == 0
    assert len(router.asked) == 2


def test_a_url_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["doctor", "--url", "router:8000"]) == 2
