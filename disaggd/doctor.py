"""`disaggd doctor`: has a router check its cluster, and shows what works and what does not, and why. Runs once and ends."""

import json
import sys
from collections.abc import Iterator

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from disaggd.config import Config, NodeConfig
from disaggd.errors import DisaggdError
from disaggd.observe.checkup import Checkup, RankWay, Verdict, WayCheck
from disaggd.router_client import RouterClient

PATIENCE_S = 60.0
"""For the router's answer: in a large cluster ways are checked one after the other."""

_COLUMNS = ("writes", "to", "ranks", "transport", "path", "GB/s", "p99 ms", "verdict")
_NUMBERS = ("GB/s", "p99 ms")
_LONG = ("writes", "to", "transport")
"""May be of any length, and give way to the figures and the verdict on a narrow terminal."""
_VERDICTS: dict[Verdict, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "wrong": ("wrong bytes", "bold red"),
    "failed": ("failed", "red"),
    "unchecked": ("not checked", "yellow"),
    "unreachable": ("unreachable", "red"),
    "refused": ("refused", "red"),
}
_PIPED_WIDTH = 200
"""Columns where there is no terminal to count them."""


def examine(url: str, api_key: str | None, *, as_json: bool) -> bool:
    """Prints a table, or what the router answered; whether all is well.

    Raises ResourceError where no router answers, and DisaggdError for an answer that is none.
    """
    client = RouterClient(url, api_key)
    checkup = client.post("/v1/cluster/check", Checkup, PATIENCE_S)
    if checkup is None:
        raise DisaggdError(f"{client.url} knows no POST /v1/cluster/check: its version is older than this one's")
    if as_json:
        sys.stdout.write(json.dumps(msgspec.to_builtins(checkup), indent=2) + "\n")
    else:
        _show(checkup)
    return checkup.ok


def url_of(config: Config) -> str:
    """Of the file's first router, as it is reached from its own host."""
    router: NodeConfig = config.nodes_of("router")[0]
    host = "127.0.0.1" if router.listen.is_wildcard else router.listen.rpartition(":")[0]
    return f"{config.router.scheme}://{host}:{router.listen.port}"


def _show(checkup: Checkup) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    if checkup.ways:
        console.print(_table(checkup))
    for line in (*_troubles(checkup), _summary(checkup)):
        console.print(line, soft_wrap=True)


def _table(checkup: Checkup) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=column not in _LONG, overflow="fold")
    for way in checkup.ways:
        for rank in way.ranks:
            table.add_row(*_cells(way, rank))
        if not way.ranks:
            table.add_row(way.writer, way.target, "", "", "", "", "", _verdict(way.verdict))
    return table


def _cells(way: WayCheck, rank: RankWay) -> tuple[str | Text, ...]:
    """Of a way between ranks that is wrong, those are ok between which nothing was."""
    verdict: Verdict = "ok" if way.verdict == "wrong" and not rank.wrong else way.verdict
    ranks = f"{rank.writer_rank} → {rank.target_rank}"
    return way.writer, way.target, ranks, rank.transport, rank.path, f"{rank.gb_per_s:.3f}", f"{rank.p99_ms:.2f}", _verdict(verdict)


def _verdict(verdict: Verdict) -> Text:
    return Text(*_VERDICTS[verdict])


def _troubles(checkup: Checkup) -> Iterator[Text]:
    for node in checkup.nodes:
        if node.link == "down":
            yield Text.assemble((node.name, "bold"), f" ({node.role}, {node.listen}): ", ("no link", "red"), f": {node.reason}")
    for way in checkup.ways:
        if way.verdict != "ok":
            yield Text.assemble((f"{way.writer} → {way.target}", "bold"), ": ", _verdict(way.verdict), f": {way.reason}")


def _summary(checkup: Checkup) -> Text:
    nodes, ways, took = _count(checkup.nodes, "node"), _count(checkup.ways, "way"), f"checked in {checkup.took_s:.1f} s"
    if checkup.ok:
        return Text(f"{nodes} and {ways} of KV, {took}: all is well", "green")
    down = sum(node.link == "down" for node in checkup.nodes)
    bad = sum(way.verdict != "ok" for way in checkup.ways)
    counts = [f"{down} of {nodes} without a link"] if down else []
    counts += [f"{bad} of {ways} of KV not as it should be"] if bad else []
    serves = any(node.role == "decode" and node.link == "up" for node in checkup.nodes)
    rest = Text("the cluster serves with the rest") if serves else Text("no decode node is left, and the cluster serves nothing", "red")
    return Text.assemble((f"{' and '.join(counts)}, {took}; ", "yellow"), rest)


def _count(things: tuple[object, ...], noun: str) -> str:
    return f"{len(things)} {noun}" if len(things) == 1 else f"{len(things)} {noun}s"
