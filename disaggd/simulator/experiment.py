"""`disaggd simulate`: one trace under several policies, each on a cluster of its own, and what came of it as a table or JSON."""

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from disaggd.config import Config, DecodeOrder, load_config
from disaggd.errors import ConfigError
from disaggd.model.directory import open_directory
from disaggd.model.spec import ModelSpec
from disaggd.simulator.cluster import START_S, Setup, SimulatedCluster
from disaggd.simulator.costs import Costs, load_costs
from disaggd.simulator.defaults import MODEL_S, default_cluster
from disaggd.simulator.policies import COMPARED, name_of, with_policy, with_routing
from disaggd.simulator.summary import Outcome, Slo, Summary, outcome_of, summarize
from disaggd.simulator.table import show
from disaggd.simulator.traces import Lengths, Scale, distinct_tokens, read_trace
from disaggd.simulator.wire import Rate
from disaggd.transfer.layout import kv_spec
from disaggd.units import Size

DEFAULT_KV_CACHE = Size(256 * 2**20)
ITL_TARGET_SHARE = 0.9


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says."""

    trace: Path
    policies: tuple[str, ...] = ()
    """None: the cluster's own, and `COMPARED`."""
    config: Path | None = None
    nodes: str | None = None
    kv_cache: str | None = None
    kv_share: float | None = None
    routing: tuple[DecodeOrder, ...] = ()
    costs: Path | None = None
    requests: int | None = None
    rate_scale: float = 1.0
    length_scale: float = 1.0
    max_input: int | None = None
    max_output: int | None = None
    ttft_slo_ms: float | None = None
    itl_slo_ms: float | None = None
    link_mbit: float | None = None
    slow_link_at: float | None = None
    slow_link_mbit: float | None = None
    as_json: bool = False
    outcomes: Path | None = None

    @property
    def scale(self) -> Scale:
        return Scale(time=1 / self.rate_scale, length=self.length_scale, max_input=self.max_input, max_output=self.max_output)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's. The halves are those of the requests that came before and after the link slowed down."""

    whole: Summary
    before: Summary | None = None
    after: Summary | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    trace: str
    nodes: str
    slo: Slo
    results: tuple[Result, ...]


def run(options: Options) -> None:
    """Prints the comparison, and each warning once. Raises ConfigError or ModelError."""
    with _warning_once():
        report = compare(options)
    if options.as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        show(report.trace, report.nodes, report.slo, [part for result in report.results for part in _parts(result)])


@contextmanager
def _warning_once() -> Iterator[None]:
    """To stderr, whichever node gives it under whichever policy: they are as many as the nodes, once for each policy."""
    handler, said = logging.StreamHandler(), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in said
        said.add(record.getMessage())
        return not known

    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    handler.addFilter(is_new)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def compare(options: Options) -> Report:
    """Replays the trace under each policy."""
    rows, setup = plan(options)
    slo = Slo(ttft_ms=options.ttft_slo_ms, itl_ms=options.itl_slo_ms)
    words = options.policies or (name_of(setup.config), *(word for word in COMPARED if word != name_of(setup.config)))
    configs = [with_policy(setup.config, word) for word in words]
    if options.routing:
        configs = [with_routing(config, order) for config in configs for order in options.routing]
    setups = [msgspec.structs.replace(setup, config=config) for config in configs]
    results = []
    with _writer(options.outcomes) as write:
        for one in setups:
            outcomes = replay(one, rows)
            write(name_of(one.config), outcomes)
            results.append(_result(name_of(one.config), outcomes, slo, one.rate_changes))
    return Report(trace=options.trace.name, nodes=_shape(setup.config), slo=slo, results=tuple(results))


@contextmanager
def _writer(path: Path | None) -> Iterator[Callable[[str, Sequence[Outcome]], None]]:
    """What takes the outcomes under a policy to the file at `path`: a line of JSON for each. Raises ConfigError."""
    if path is None:
        yield lambda policy, outcomes: None
        return
    try:
        file = path.open("wb")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error
    with file:
        yield lambda policy, outcomes: file.writelines(_line(policy, outcome) for outcome in outcomes)


def _line(policy: str, outcome: Outcome) -> bytes:
    return msgspec.json.encode({"policy": policy, **msgspec.structs.asdict(outcome)}) + b"\n"


def plan(options: Options) -> tuple[list[Lengths], Setup]:
    """The requests, and the cluster that is to serve them."""
    rows = read_trace(options.trace, options.requests, options.scale)
    config, spec = _cluster(options)
    if (size := _kv_cache(options, rows, spec, config)) is not None:
        config = msgspec.structs.replace(config, nodes=tuple(msgspec.structs.replace(node, kv_cache=size) for node in config.nodes))
    costs = Costs() if options.costs is None else load_costs(options.costs)
    if options.link_mbit is not None:
        costs = msgspec.structs.replace(costs, link=msgspec.structs.replace(costs.link, kv_mbit_per_s=options.link_mbit))
    return rows, Setup(config=config, spec=spec, costs=costs, block=options.scale.block, rate_changes=_slow_link(options, rows))


def _cluster(options: Options) -> tuple[Config, ModelSpec]:
    if options.config is None:
        return _with_targets(default_cluster(options.nodes or "1P1D", DEFAULT_KV_CACHE), options), MODEL_S
    if options.nodes is not None:
        raise ConfigError("--nodes makes a cluster, and --config names one: give one of them")
    config = load_config(options.config)
    return config, open_directory(config.model.path).spec(config.model.dtype)


def _with_targets(config: Config, options: Options) -> Config:
    """Who has an SLO and no file would have the file say so, with a little to spare where a step may miss by a little."""
    rules = config.disaggregation
    if options.ttft_slo_ms is not None:
        rules = msgspec.structs.replace(rules, ttft_target_ms=options.ttft_slo_ms)
    if options.itl_slo_ms is not None:
        rules = msgspec.structs.replace(rules, itl_target_ms=ITL_TARGET_SHARE * options.itl_slo_ms)
    return msgspec.structs.replace(config, disaggregation=rules)


def _kv_cache(options: Options, rows: Sequence[Lengths], spec: ModelSpec, config: Config) -> Size | None:
    """What every node's pool shall have; None: what the file says."""
    if options.kv_cache is not None and options.kv_share is not None:
        raise ConfigError("--kv-cache and --kv-share both say how large the pools are: give one of them")
    if options.kv_share is not None:
        block_size = config.nodes_of("decode")[0].block_size
        kv_bytes = distinct_tokens(rows, options.scale.block) * kv_spec(spec, block_size).bytes_per_block / block_size
        return Size(max(1, int(options.kv_share * kv_bytes)))
    try:
        return None if options.kv_cache is None else Size.parse(options.kv_cache)
    except ValueError as error:
        raise ConfigError(f"--kv-cache: {error}") from error


def replay(setup: Setup, rows: Sequence[Lengths]) -> list[Outcome]:
    """What became of each request, in the order of their arrival."""
    with _uncollected():
        return [outcome_of(client, START_S) for client in SimulatedCluster(setup).replay(rows)]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without collections: they find nothing here, and take a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _slow_link(options: Options, rows: Sequence[Lengths]) -> tuple[Rate, ...]:
    if (options.slow_link_at is None) != (options.slow_link_mbit is None):
        raise ConfigError("--slow-link-at and --slow-link-mbit go together: when, and how slow")
    if options.slow_link_at is None or options.slow_link_mbit is None:
        return ()
    first_late = rows[min(len(rows) - 1, int(len(rows) * options.slow_link_at))]
    return (Rate(first_late.arrival_s, options.slow_link_mbit * 1e6 / 8),)


def _result(policy: str, outcomes: list[Outcome], slo: Slo, changes: Sequence[Rate]) -> Result:
    whole = summarize(policy, outcomes, slo)
    if not changes:
        return Result(whole=whole)
    before = [one for one in outcomes if one.arrived_s < changes[0].since_s]
    after = [one for one in outcomes if one.arrived_s >= changes[0].since_s]
    return Result(
        whole=whole,
        before=summarize(f"{policy}, before", before, slo) if before else None,
        after=summarize(f"{policy}, after", after, slo) if after else None,
    )


def _parts(result: Result) -> list[Summary]:
    return [part for part in (result.whole, result.before, result.after) if part is not None]


def _shape(config: Config) -> str:
    return f"{len(config.nodes_of('prefill'))}P{len(config.nodes_of('decode'))}D"
