"""The TOML file: what a cluster is. Read once by every process, checked as a whole, never written.

`load_config` gives frozen structs or a `ConfigError` that names the file, the path in it, and what would be valid.
Knows nothing of roles' code, torch or asyncio.
"""

import os
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from disaggd.errors import ConfigError
from disaggd.ids import NodeName
from disaggd.toml_file import convert, naming, parse_toml, place, read_text
from disaggd.units import MAX_BLOCK_SIZE, Address, PortRange, Size

Role = Literal["router", "prefill", "decode"]
WireDtype = Literal["auto", "fp8"]
DecodeOrder = Literal["cost", "round_robin"]

ROLES: tuple[Role, ...] = get_args(Role)
DECODE_ORDERS: tuple[DecodeOrder, ...] = get_args(DecodeOrder)
CONFIG_VARIABLE = "DISAGGD_CONFIG"
DEFAULT_PATH = Path("config.toml")

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Device = Annotated[str, msgspec.Meta(pattern=r"^(cpu|cuda(:[0-9]+)?)$", description='"cpu", "cuda" or "cuda:N"')]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Secret = Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{16,}$", description="16 or more ASCII letters, digits and signs, no blanks")]

CPU_KV_CACHE = Size(256 * 2**20)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[model]`: what the cluster serves. The same on every node."""

    path: Annotated[str, msgspec.Meta(min_length=1)] = "builtin:tiny"
    """A Hugging Face directory, relative to the file's own, or the model that ships with disaggd."""
    name: str | None = None
    """What clients call it; None takes the last part of `path`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights, activations and KV; auto is the checkpoint's own."""
    weights: Literal["auto", "int8"] = "auto"
    """auto: as `dtype` says; int8: those of all projections in 8 bits, on CPUs."""
    max_model_len: Positive | None = None
    """Prompt and output together, in tokens; None is the model's own limit."""

    @property
    def served_name(self) -> str:
        return self.name or re.split(r"[:/]", self.path.rstrip("/"))[-1] or self.path


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[router]`: the HTTP side."""

    max_body_bytes: Size = Size(4 * 2**20)
    """A larger request body is refused with 413."""
    request_timeout_s: Seconds = 600.0
    """A request that takes longer is ended."""
    stall_s: Seconds = 10.0
    """A request that has not moved for so long is logged, with its phase and whom it waits for, and counted."""
    max_requests: Positive = 256
    """In flight at once; one more is refused with 429."""
    kv_overcommit: Annotated[float, msgspec.Meta(ge=0.1, le=1000)] = 2.0
    """So many times what the decode nodes' pools hold may all sequences in flight be predicted to need; one more is refused with 429."""
    max_connections: Positive = 4096
    """Of clients; one more is answered 503 and closed."""
    head_timeout_s: Seconds = 10.0
    """A connection on which no request's head has come after so long is closed."""
    body_timeout_s: Seconds = 30.0
    """A request whose body is not whole so long after its head is refused with 408."""
    keep_alive_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 60
    """An idle connection is closed so long after its last reply."""
    client_stall_s: Seconds = 30.0
    """A client that reads nothing for so long, though something waits for it, is cut, and its sequences are aborted."""
    max_unread_tokens: Positive = 2048
    """Of one sequence, that may wait for its client beside what sockets hold; with more, the sequence is aborted."""
    max_unread_tokens_in_all: Positive = 131_072
    """Of all sequences together (20 MB); beyond, the one with most is aborted."""
    receipts: Positive = 1000
    """The last so many receipts can be read at `/v1/requests/{id}`."""
    trace_minutes: Annotated[float, msgspec.Meta(ge=0, le=1440)] = 5.0
    """So far back `/v1/cluster/trace` reaches; 0 records nothing."""
    tls_cert: str | None = None
    """Certificate chain of the HTTP side, in PEM; with `tls_key`, or neither: plain HTTP. Paths are relative to this file's directory."""
    tls_key: str | None = None
    api_keys: str | None = None
    """A file of API keys (`disaggd key NAME` makes one), read again when it changes; None: whoever reaches the router may do everything."""
    metrics: Literal["open", "key"] = "key"
    """Who may read `/metrics` where there are API keys: everybody, or the holders of keys that have `admin`."""

    @property
    def scheme(self) -> Literal["http", "https"]:
        return "http" if self.tls_cert is None else "https"


class DisaggregationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[disaggregation]`: which prompts are prefilled elsewhere."""

    policy: Literal["adaptive", "threshold", "always", "never"] = "adaptive"
    """`adaptive` weighs what both ways are predicted to take; the others go by length alone."""
    max_local_prefill_tokens: Count = 512
    """`threshold`, and `adaptive` before anything was measured: up to so many uncached prompt tokens are prefilled by the decode node."""
    max_prefill_queue: Positive = 16
    """Jobs that may wait for a prefill node; from here on decode nodes prefill locally."""
    max_prefill_queue_tokens: Positive = 262_144
    """Prompt tokens of all jobs that wait; the bound that is reached first counts."""
    ttft_target_ms: Annotated[float, msgspec.Meta(gt=0, le=600_000)] = 2000.0
    """Time to first token that requests should meet: it orders the prefill queue, and `adaptive` shuns what puts it at risk."""
    itl_target_ms: Annotated[float, msgspec.Meta(gt=0, le=60_000)] | None = None
    """Inter-token latency that running streams should meet while a prompt is prefilled beside them: it sizes the prompt's chunks.
    None: chunks are as large as `max_step_tokens` allows."""
    queue_aging_s: Seconds = 10.0
    """A job that has waited so long goes before every later one, however urgent."""
    self_measurement: bool = True
    """Engine nodes time a few steps at their start (a second or two), so that the first decisions are informed."""
    prefix_push: Literal["auto", "always", "never"] = "auto"
    """A prefill node that lacks the beginning of a prompt which the decode node has cached computes it, or has it pushed, whichever
    is predicted to be quicker; or always, or never pushed. KV on GPUs is not pushed to prefill nodes so far."""
    max_retries: Count = 2
    """So often a lost prefill is tried again elsewhere; then the decode node does it."""
    grant_patience_s: Seconds = 2.0
    """A job that waited so long for room at its decode node gets the blocks that come free there."""


class RoutingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[routing]`: which decode node takes a request. The cheapest, in units of a token's prefill."""

    decode: DecodeOrder = "cost"
    """round_robin: each in its turn, whatever it has cached: a baseline to compare with."""
    prefill_weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Of each token of the prompt that the node does not have cached, and of the prompts that it has to prefill before it."""
    load_weight: Annotated[float, msgspec.Meta(ge=0)] = 0.1
    """Of each token of the sequences that run there: it is read in every step, and not computed. Reading a token takes about a
    five-hundredth of computing it, so that this is a token read for fifty steps: outputs of usual length. A node whose steps are more than
    twice as long as the fastest one's counts as loaded by as much as they are longer."""


class TransferConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[transfer]`: how KV moves. NIXL has no authentication: keep devices and ports behind a firewall."""

    transports: str = "tcp"
    """UCX transports that KV may use."""
    devices: str = ""
    """Network interfaces that KV may use, comma-separated. Empty is loopback; a node that listens beyond it must name them."""
    port_range: PortRange = PortRange((18500, 18999))
    """NIXL listens here: at least eight ports for each pair of nodes that has an end on this host (four without `prefix_push`)."""
    lease_s: Seconds = 5.0
    """A grant of blocks that shows no progress for so long is taken back."""
    quiesce_s: Seconds = 10.0
    """A prefill node that does not confirm within this that it stopped writing is fenced off."""
    push_timeout_s: Seconds = 30.0
    """A node is given up of whose writes, of a layer or so each, none ends for so long."""
    user_timeout_s: Seconds = 5.0
    """TCP gives a silent peer up after this."""
    staging: Size = Size(2**30)
    """Bytes of pinned host memory, on a node with a GPU, that its KV goes through. A prompt whose KV they do not hold at once is
    prefilled by its decode node."""
    wire_dtype: WireDtype = "auto"
    """Of KV on its way to a decode node: as it is, or `fp8`, float8 e4m3 with a scale for each head of a block. That is half of bfloat16's
    bytes, for a slow network; what is decoded from it differs a little. Prefixes go back as they are."""
    direct_slice_bytes: Size = Size(1)
    """What a rank gets of a block, where it is less and other ranks' parts lie in between, is gathered into whole blocks of that rank
    first, and these are written. That pays only where many blocks of a write are neighbours at the target: by default never."""
    check_pairs: bool = True
    """Before KV goes from one node to another, a pattern does, and must arrive as it was; a pair that fails is named, and not used."""
    verify: bool = False
    """Every block that lands is compared with its sender's checksum; one that differs is computed again, never used."""
    layer_group: Positive = 1
    """Layers per write: with one, at most about a layer's wire time is exposed; twelve writes cost TCP no more than one."""


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[cluster]`: the links between routers and engine nodes."""

    heartbeat_s: Seconds = 1.0
    missed_heartbeats: Positive = 3
    """So many silent heartbeats and a link counts as lost."""
    reconnect_max_s: Seconds = 1.0
    """The longest pause between two attempts to reach a node."""
    stuck_s: Seconds = 60.0
    """An engine node whose compute or transfer thread does not get on for so long, not by one layer or one call, ends itself; so does one
    in which connecting an agent takes so long."""
    drain_s: Seconds = 30.0
    """A node that is told to stop finishes what it has, for so long at most. Whoever kills it must wait longer: `TimeoutStopSec` of its
    systemd unit."""
    secret: Secret | None = None
    """Shared by all nodes, and proved by both ends of every link; required once any node listens beyond loopback."""
    tls_cert: str | None = None
    """Certificate chain of this host's nodes, in PEM. With `tls_key` and `tls_ca`, or none of the three: links without TLS.
    Paths are relative to this file's directory."""
    tls_key: str | None = None
    tls_ca: str | None = None
    """The authority that signed every node's certificate, and nobody else's: both ends of a link ask for one."""


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[[node]]`: one process of the cluster."""

    name: Annotated[
        NodeName,
        msgspec.Meta(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$",
            description='up to 63 ASCII letters, digits, "_", "." and "-", the first a letter or a digit',
        ),
    ]
    role: Role
    listen: Address
    """Where a router serves HTTP; where routers reach an engine node."""
    device: Device = "cpu"
    devices: tuple[Device, ...] | None = None
    """One for each rank, in place of `device`: ranks on GPUs have one each, of this host."""
    kv_cache: Size | None = None
    """Bytes of the KV pool, all ranks together; None on a CPU is 256 MiB, on a GPU nine tenths of what the weights leave free."""
    block_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCK_SIZE)] = 64
    """Tokens per block. Nodes of different sizes hand KV over all the same, but share no cached prefix as it is."""
    threads: Positive = 1
    """Compute threads (CPU)."""
    cpus: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)] | None = None
    """Pin the process to these processors."""
    tp: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Tensor parallelism: so many ranks compute the model together, each a process, with `threads` of its own on a CPU, on one of
    `devices` on GPUs."""
    max_step_tokens: Positive = 1024
    """Tokens computed per step, over all sequences."""
    max_sequences: Positive = 64
    """Sequences that run at once."""
    prefix_cache: bool = True
    """Keep the KV of finished sequences for prompts that begin alike, until its blocks are needed."""

    @property
    def kv_cache_bytes(self) -> int | None:
        """Bytes of the KV pool; None where only the device knows."""
        return CPU_KV_CACHE if self.kv_cache is None and not self.is_gpu else self.kv_cache

    @property
    def shares_prefixes(self) -> bool:
        """Whether cached prefixes may leave it, or come: staging memory takes KV in one direction only."""
        return self.prefix_cache and not self.is_gpu

    @property
    def is_gpu(self) -> bool:
        return self.rank_devices[0] != "cpu"

    @property
    def rank_devices(self) -> tuple[str, ...]:
        """What each rank computes on; without `devices` all on the same, which can only be a CPU's."""
        return self.devices or (self.device,) * self.tp


_ROUTER_KEYS = frozenset({"name", "role", "listen", "cpus"})
"""Of a node's keys, those that a router obeys; the rest is of engines."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    model: ModelConfig = ModelConfig()
    router: RouterConfig = RouterConfig()
    disaggregation: DisaggregationConfig = DisaggregationConfig()
    routing: RoutingConfig = RoutingConfig()
    transfer: TransferConfig = TransferConfig()
    cluster: ClusterConfig = ClusterConfig()
    nodes: tuple[NodeConfig, ...] = msgspec.field(name="node", default=())

    def node(self, name: str) -> NodeConfig:
        """The node called `name`; ConfigError naming the others if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise ConfigError(f"no node {name!r}; the file has {_listed(node.name for node in self.nodes)}")

    def pushes_prefixes(self, node: NodeConfig) -> bool:
        """Whether decode nodes may push prefixes to this node, or this one may, if it is one."""
        return node.shares_prefixes and self.disaggregation.prefix_push != "never"

    def lands_in_fp8(self, node: NodeConfig) -> bool:
        """Whether what is written to this node is in fp8."""
        return node.role == "decode" and self.transfer.wire_dtype == "fp8" and bool(self.nodes_of("prefill"))

    def exposed_without_keys(self, node: NodeConfig) -> bool:
        """Whether anybody whom `node`, if it is a router, can be reached by may use it."""
        return node.role == "router" and not node.listen.is_loopback and self.router.api_keys is None

    def nodes_of(self, *roles: Role) -> tuple[NodeConfig, ...]:
        return tuple(node for node in self.nodes if node.role in roles)

    def choose(self, role: Role | None, name: str | None) -> NodeConfig:
        """The node that `--role` and `--name` ask for: by name, or the only one of its role."""
        if name is not None:
            node = self.node(name)
            if role not in (None, node.role):
                raise ConfigError(f"node {name!r} is a {node.role} node, not {role}")
            return node
        if role is None:
            raise ConfigError("which node? give --role or --name")
        nodes = self.nodes_of(role)
        if len(nodes) == 1:
            return nodes[0]
        if not nodes:
            raise ConfigError(f"the file has no {role} node")
        raise ConfigError(f"{len(nodes)} nodes have the role {role}: choose one with --name ({_listed(node.name for node in nodes)})")


def find_config(option: str | Path | None) -> Path:
    """Where the file is: the option, else $DISAGGD_CONFIG, else ./config.toml."""
    return Path(option or os.environ.get(CONFIG_VARIABLE) or DEFAULT_PATH)


def single_node() -> Config:
    """What is served where there is no file: the built-in model on one engine."""
    return Config(nodes=(NodeConfig(name=NodeName("local"), role="decode", listen=Address("127.0.0.1:8101")),))


def load_config(path: str | Path) -> Config:
    """Reads and checks the file at `path`; a relative model path in it starts from its directory. Raises ConfigError."""
    with naming(path):
        text = read_text(Path(path), if_absent=f" (name one with --config or ${CONFIG_VARIABLE})")
        return _anchored(parse_config(text), Path(path).absolute().parent)


_FILES = {"router": ("api_keys", "tls_cert", "tls_key"), "cluster": ("tls_cert", "tls_key", "tls_ca")}
"""Keys that name files, besides the model's."""


def _anchored(config: Config, directory: Path) -> Config:
    """The same from whatever directory it is read: absolute paths, `~` and built-in models stay what they are."""
    sections: dict[str, msgspec.Struct] = {}
    for section, names in _FILES.items():
        table = getattr(config, section)
        given = {name: Path(path).expanduser() for name in names if (path := getattr(table, name)) is not None}
        sections[section] = msgspec.structs.replace(table, **{name: str(directory / path) for name, path in given.items()})
    path = config.model.path
    if not path.startswith(("builtin:", "~", "/")):
        sections["model"] = msgspec.structs.replace(config.model, path=str(directory / path))
    return msgspec.structs.replace(config, **sections)


def parse_config(text: str) -> Config:
    """The cluster that `text` describes. Raises ConfigError."""
    raw = parse_toml(text)
    config = convert(raw, Config)
    for index, node in enumerate(raw.get("node", ())):
        _refuse_engine_keys(node, place("node", index, node))
        _refuse_two_keys_for_devices(node, place("node", index, node))
    for check in _CHECKS:
        check(config)
    return config


# ── what the file says as a whole ────────────────────────────────────────────────────────────────────────────────────


def _refuse_engine_keys(node: dict[str, object], where: str) -> None:
    """Looks at what the file says, before defaults make every node alike."""
    if node["role"] == "router":
        for key in node:
            if key not in _ROUTER_KEYS:
                raise ConfigError(f"{where}.{key}: has no meaning for a router, which neither computes nor holds KV; remove it")


def _refuse_two_keys_for_devices(node: dict[str, object], where: str) -> None:
    if "device" in node and "devices" in node:
        raise ConfigError(f"{where}.device: stands beside devices, which says all; remove it")


def _check_roles(config: Config) -> None:
    for role in ("router", "decode"):
        if not config.nodes_of(role):
            raise ConfigError(f'no {role} node: add a [[node]] with role = "{role}"')


def _check_names(config: Config) -> None:
    name, times = Counter(node.name for node in config.nodes).most_common(1)[0]
    if times > 1:
        where = ", ".join(f"node[{index}]" for index, node in enumerate(config.nodes) if node.name == name)
        raise ConfigError(f"{where}: {times} nodes are called {name!r}; names must differ")


def _check_addresses(config: Config) -> None:
    for one, other in combinations(config.nodes, 2):
        if one.listen.clashes_with(other.listen):
            raise ConfigError(f"nodes {one.name!r} ({one.listen}) and {other.name!r} ({other.listen}) listen on one port")


def _check_secret(config: Config) -> None:
    for node in config.nodes:
        if not node.listen.is_loopback and config.cluster.secret is None:
            raise ConfigError(f"node {node.name!r} listens beyond loopback ({node.listen}): set cluster.secret (16 or more characters)")


def _check_tls(config: Config) -> None:
    """Files that belong together."""
    for section, names in _FILES.items():
        wanted = [name for name in names if name.startswith("tls_")]
        absent = [name for name in wanted if getattr(getattr(config, section), name) is None]
        if absent and len(absent) < len(wanted):
            raise ConfigError(f"{section}.{absent[0]}: is missing; TLS needs {', '.join(wanted)}")


def _check_blocks(config: Config) -> None:
    for node in config.nodes_of("prefill", "decode"):
        least = node.block_size + node.max_sequences
        if node.max_step_tokens < least:
            raise ConfigError(
                f"node {node.name!r}: max_step_tokens is {node.max_step_tokens}, but a step must hold a token of each sequence and a block "
                f"of a prefill: block_size + max_sequences = {least}"
            )


def _check_devices(config: Config) -> None:
    for node in config.nodes:
        where = f"node {node.name!r}: devices"
        if node.devices is None:
            if node.is_gpu and node.tp > 1:
                raise ConfigError(
                    f"{where}: is missing; tp = {node.tp} on GPUs takes a device for each rank, but there is only {node.device}"
                )
            continue
        if len(node.devices) != node.tp:
            raise ConfigError(
                f"{where}: has {len(node.devices)} of them ({', '.join(node.devices)}), but tp = {node.tp}: one for each rank"
            )
        if len({device == "cpu" for device in node.devices}) > 1:
            raise ConfigError(f"{where}: {', '.join(node.devices)} are a CPU and GPUs, which compute nothing together")
        index, times = Counter(int(device.partition(":")[2] or 0) for device in node.devices).most_common(1)[0]
        if node.is_gpu and times > 1:
            raise ConfigError(f"{where}: cuda:{index} is there {times} times; each rank must have a GPU of its own")


def _check_weights(config: Config) -> None:
    for node in config.nodes:
        if config.model.weights == "int8" and node.is_gpu:
            device = node.rank_devices[0]
            raise ConfigError(f'node {node.name!r}: model.weights = "int8" is for CPU nodes so far, but its device is {device}')


def _check_transfer_ports(config: Config) -> None:
    """Each pair of a prefill and a decode node has an agent in each of their ranks, two if decode pushes prefixes back; and a fenced
    agent's port stays taken a while."""
    first, last = config.transfer.port_range
    agents: Counter[str] = Counter()
    for prefill, decode in product(config.nodes_of("prefill"), config.nodes_of("decode")):
        num_ways = 2 if config.pushes_prefixes(prefill) and config.pushes_prefixes(decode) else 1
        for node in (prefill, decode):
            agents[node.listen.host] += num_ways * node.tp
    for host, count in agents.items():
        if last - first + 1 < 4 * count:
            raise ConfigError(f"transfer.port_range {first}-{last} is too small: the nodes on {host} need {4 * count} ports")
    for node in config.nodes:
        if first <= node.listen.port <= last:
            raise ConfigError(f"node {node.name!r} listens on {node.listen.port}, which is in transfer.port_range {first}-{last}")


_CHECKS = (
    _check_roles,
    _check_names,
    _check_addresses,
    _check_secret,
    _check_tls,
    _check_blocks,
    _check_devices,
    _check_weights,
    _check_transfer_ports,
)


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"
