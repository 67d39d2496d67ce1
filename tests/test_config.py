"""What the TOML file may say, and how a mistake in it is answered."""

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.config import Config, NodeConfig, find_config, load_config, parse_config
from disaggd.errors import ConfigError
from disaggd.units import Address, PortRange, Size

ROUTER = '[[node]]\nname = "router"\nrole = "router"\nlisten = "127.0.0.1:8000"\n'
PREFILL = '[[node]]\nname = "p0"\nrole = "prefill"\nlisten = "127.0.0.1:8101"\n'
DECODE = '[[node]]\nname = "d0"\nrole = "decode"\nlisten = "127.0.0.1:8102"\n'
CLUSTER = ROUTER + PREFILL + DECODE
REMOTE = CLUSTER.replace("127.0.0.1:8102", "10.0.0.2:8102")


def test_the_file_at_the_root_is_a_working_cluster_on_this_host() -> None:
    config = load_config(Path(__file__).parent.parent / "config.toml")
    assert [(node.name, node.role, node.listen) for node in config.nodes] == [
        ("router", "router", "127.0.0.1:8000"),
        ("p0", "prefill", "127.0.0.1:8101"),
        ("d0", "decode", "127.0.0.1:8102"),
    ]
    assert (config.model.path, config.model.dtype) == ("builtin:tiny", "float32")
    assert 40 <= config.disaggregation.max_local_prefill_tokens < 1500


def test_the_file_at_the_root_shows_the_defaults() -> None:
    config = load_config(Path(__file__).parent.parent / "config.toml")
    assert (config.router, config.cluster) == (Config().router, Config().cluster)
    assert config.disaggregation == Config().disaggregation


def test_the_file_at_the_root_explains_every_key_and_no_other() -> None:
    shown: dict[str, set[str]] = {}
    section = ""
    for line in (Path(__file__).parent.parent / "config.toml").read_text().splitlines():
        if header := re.match(r"(?:# )?\[\[?(\w+)\]", line):
            section = header[1]
        elif key := re.match(r"(?:# )?(\w+) = ", line):
            shown.setdefault(section, set()).add(key[1])
    tables = {field.encode_name: NodeConfig if field.encode_name == "node" else field.type for field in msgspec.structs.fields(Config)}
    assert shown == {section: set(table.__struct_fields__) for section, table in tables.items()}


def test_only_what_decode_nodes_get_is_in_fp8() -> None:
    config = parse_config(f'[transfer]\nwire_dtype = "fp8"\n{CLUSTER}')
    assert [config.lands_in_fp8(config.node(name)) for name in ("p0", "d0")] == [False, True]
    assert not any(map(parse_config(CLUSTER).lands_in_fp8, config.nodes))
    alone = parse_config(f'[transfer]\nwire_dtype = "fp8"\n{ROUTER + DECODE}')
    assert not alone.lands_in_fp8(alone.node("d0"))


def test_sizes_are_bytes() -> None:
    assert parse_config(CLUSTER + 'kv_cache = "1.5GiB"').node("d0").kv_cache == 3 * 2**29
    assert parse_config(CLUSTER + "kv_cache = 4096").node("d0").kv_cache == 4096


@given(st.integers(1, 2**50), st.sampled_from(["", "B", "KiB", "MiB", "GiB"]))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert Size.parse(f"{number} {unit}".strip()) == number * 1024 ** ["", "B", "KiB", "MiB", "GiB"][1:].index(unit or "B")


@pytest.mark.parametrize("listen", ["[::1]:8000", "localhost:8000", "127.0.0.9:8000"])
def test_loopback_addresses_are_known(listen: str) -> None:
    assert Address.parse(listen).is_loopback
    assert Address.parse(listen).port == 8000


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "10.0.0.1:1", "node7:1", "[::]:1"])
def test_every_other_address_counts_as_beyond_loopback(listen: str) -> None:
    assert not Address.parse(listen).is_loopback


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("127.0.0.1:1", "127.0.0.1:1", True),
        ("127.0.0.1:1", "127.0.0.1:2", False),
        ("localhost:1", "127.0.0.1:1", True),
        ("0.0.0.0:1", "127.0.0.1:1", True),
        ("0.0.0.0:1", "10.0.0.1:1", False),
        ("10.0.0.1:1", "10.0.0.2:1", False),
    ],
)
def test_addresses_clash_where_one_host_could_not_listen_on_both(one: str, other: str, clash: bool) -> None:
    assert Address(one).clashes_with(Address(other)) is clash
    assert Address(other).clashes_with(Address(one)) is clash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DECODE + "blok_size = 16\n" + ROUTER, "node[0] (d0).blok_size: unknown key (block_size?)"),
        ("[disagregation]\n" + CLUSTER, "disagregation: unknown key (disaggregation?)"),
        ("[transfer]\nzebra = 1\n" + CLUSTER, "transfer.zebra: unknown key (known: transports, devices, "),
        (CLUSTER + 'block_size = "x"', "node[2] (d0).block_size: expected int, got str"),
        (CLUSTER + "threads = true", "node[2] (d0).threads: expected int, got bool"),
        (CLUSTER + "threads = 0", "node[2] (d0).threads: expected int >= 1"),
        (CLUSTER + 'device = "tpu"', 'node[2] (d0).device: expected "cpu", "cuda" or "cuda:N"'),
        (CLUSTER + 'kv_cache = "256 megs"', "node[2] (d0).kv_cache: '256 megs' is not a size"),
        (CLUSTER + 'kv_cache = "0MiB"', "node[2] (d0).kv_cache: a size must be at least 1 byte"),
        (CLUSTER + "kv_cache = -1", "node[2] (d0).kv_cache: -1 is not a size"),
        (CLUSTER + "kv_cache = true", "node[2] (d0).kv_cache: expected a size"),
        (CLUSTER.replace("127.0.0.1:8102", "127.0.0.1"), "node[2] (d0).listen: '127.0.0.1' is not an address"),
        (CLUSTER.replace(":8102", ":81020"), "node[2] (d0).listen: '127.0.0.1:81020' is not an address"),
        (CLUSTER.replace('"decode"', '"decoder"'), "node[2] (d0).role: 'decoder' is not one of router, prefill, decode (decode?)"),
        (CLUSTER.replace('name = "d0"\n', ""), "node[2]: table missing required field name"),
        (CLUSTER.replace('role = "prefill"\n', ""), "node[1] (p0): table missing required field role"),
        (CLUSTER.replace('"p0"', '"p 0"'), 'node[1] (p 0).name: expected up to 63 ASCII letters, digits, "_", "." and "-"'),
        (ROUTER + 'kv_cache = "1GiB"\n' + DECODE, "node[0] (router).kv_cache: has no meaning for a router"),
        (f'[model]\ndtype = "float23"\n{CLUSTER}', "model.dtype: 'float23' is not one of auto, float32, bfloat16, float16 (float32?)"),
        (f'[disaggregation]\npolicy = "zzz"\n{CLUSTER}', "disaggregation.policy: 'zzz' is not one of adaptive, threshold, always, never"),
        (f'[model]\nweights = "int4"\n{CLUSTER}', "model.weights: 'int4' is not one of auto, int8 (int8?)"),
        (
            f'[model]\nweights = "int8"\n{CLUSTER}device = "cuda:1"',
            "node 'd0': model.weights = \"int8\" is for CPU nodes so far, but its device is cuda:1",
        ),
        (CLUSTER + 'devices = ["cuda", "tpu"]', 'node[2] (d0).devices[1]: expected "cpu", "cuda" or "cuda:N"'),
        (CLUSTER + 'device = "cuda"\ndevices = ["cuda"]', "node[2] (d0).device: stands beside devices, which says all; remove it"),
        (CLUSTER + 'tp = 2\ndevice = "cuda:1"', "node 'd0': devices: is missing; tp = 2 on GPUs takes a device for each rank"),
        (
            CLUSTER + 'tp = 3\ndevices = ["cuda:0", "cuda:1"]',
            "node 'd0': devices: has 2 of them (cuda:0, cuda:1), but tp = 3: one for each",
        ),
        (CLUSTER + 'devices = ["cuda:0", "cuda:1"]', "node 'd0': devices: has 2 of them (cuda:0, cuda:1), but tp = 1"),
        (
            CLUSTER + 'tp = 2\ndevices = ["cuda:0", "cpu"]',
            "node 'd0': devices: cuda:0, cpu are a CPU and GPUs, which compute nothing together",
        ),
        (CLUSTER + 'tp = 2\ndevices = ["cpu", "cuda"]', "node 'd0': devices: cpu, cuda are a CPU and GPUs"),
        (
            CLUSTER + 'tp = 3\ndevices = ["cuda", "cuda:1", "cuda:0"]',
            "node 'd0': devices: cuda:0 is there 2 times; each rank must have a GPU",
        ),
        (CLUSTER + "cpus = [-1]", "node[2] (d0).cpus[0]: expected int >= 0"),
        ("node = 3", "node: expected array, got int"),
        (f'[transfer]\nport_range = "9-1"\n{CLUSTER}', "transfer.port_range: '9-1' is not a port range"),
        (f"[cluster]\nheartbeat_s = nan\n{CLUSTER}", "cluster.heartbeat_s: expected float"),
        (f'[cluster]\nsecret = "short"\n{CLUSTER}', "cluster.secret: expected 16 or more ASCII letters, digits and signs, no blanks"),
        ("[model\n", "not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 7)"),
        (DECODE, "no router node"),
        (ROUTER + PREFILL, "no decode node"),
        (CLUSTER.replace('"d0"', '"p0"'), "node[1], node[2]: 2 nodes are called 'p0'"),
        (CLUSTER.replace("8102", "8101"), "nodes 'p0' (127.0.0.1:8101) and 'd0' (127.0.0.1:8101) listen on one port"),
        (REMOTE, "node 'd0' listens beyond loopback (10.0.0.2:8102): set cluster.secret"),
        (f'[router]\ntls_key = "x.key"\n{CLUSTER}', "router.tls_cert: is missing; TLS needs tls_cert, tls_key"),
        (f'[cluster]\ntls_cert = "x.pem"\ntls_key = "x.key"\n{CLUSTER}', "cluster.tls_ca: is missing; TLS needs tls_cert, tls_key, tls_ca"),
        (CLUSTER + "block_size = 2048", "node[2] (d0).block_size: expected int <= 1024"),
        (CLUSTER + "block_size = 1024", "node 'd0': max_step_tokens is 1024, but a step must hold"),
        (CLUSTER + "max_step_tokens = 63", "node 'd0': max_step_tokens is 63, but a step must hold"),
        (
            f'[transfer]\nport_range = "18500-18506"\n{CLUSTER}',
            "transfer.port_range 18500-18506 is too small: the nodes on 127.0.0.1 need 16 ports",
        ),
        (
            f'[transfer]\nport_range = "18500-18506"\n[disaggregation]\nprefix_push = "never"\n{CLUSTER}',
            "transfer.port_range 18500-18506 is too small: the nodes on 127.0.0.1 need 8 ports",
        ),
        (
            f'[transfer]\nport_range = "18500-18506"\n{CLUSTER}prefix_cache = false',
            "transfer.port_range 18500-18506 is too small: the nodes on 127.0.0.1 need 8 ports",
        ),
        (f'[transfer]\nport_range = "8100-8200"\n{CLUSTER}', "node 'p0' listens on 8101, which is in transfer.port_range 8100-8200"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert str(caught.value).startswith(message)


def test_beyond_loopback_needs_a_secret_and_then_works() -> None:
    secret = "0123456789abcdef"
    config = parse_config(f'[cluster]\nsecret = "{secret}"\n{REMOTE}')
    assert config.cluster.secret == secret


def test_a_bad_secret_is_not_repeated_in_the_error() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f'[cluster]\nsecret = "hunter2"\n{CLUSTER}')
    assert "hunter2" not in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("\nx = !")
    with pytest.raises(ConfigError, match=r"mine\.toml: not valid TOML: .*line 2"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file \(name one with --config or \$DISAGGD_CONFIG\)"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_a_relative_model_path_starts_from_the_files_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf" / "cluster.toml"
    path.write_text(f'[model]\npath = "../models/small"\n{CLUSTER}')
    monkeypatch.chdir(tmp_path)
    for spelt in (path, path.relative_to(tmp_path)):
        model = load_config(spelt).model
        assert (model.path, model.served_name) == (f"{tmp_path}/conf/../models/small", "small")


def test_the_files_of_tls_start_from_the_files_directory(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(
        f'[router]\ntls_cert = "a.pem"\ntls_key = "/b.key"\n[cluster]\ntls_cert = "c"\ntls_key = "d"\ntls_ca = "tls/e"\n{CLUSTER}'
    )
    config = load_config(path)
    assert (config.router.tls_cert, config.router.tls_key, config.router.scheme) == (f"{tmp_path}/a.pem", "/b.key", "https")
    assert (config.cluster.tls_cert, config.cluster.tls_ca) == (f"{tmp_path}/c", f"{tmp_path}/tls/e")


@pytest.mark.parametrize("model", ["builtin:tiny", "~/models/small", "/models/small"])
def test_other_model_paths_stay_as_they_are(tmp_path: Path, model: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(f'[model]\npath = "{model}"\n{CLUSTER}')
    assert load_config(path).model.path == model


def test_a_router_may_be_pinned() -> None:
    assert parse_config(ROUTER + "cpus = [0, 1]\n" + DECODE).node("router").cpus == (0, 1)


def test_the_option_beats_the_environment_beats_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGGD_CONFIG", "/etc/disaggd.toml")
    assert find_config("mine.toml") == Path("mine.toml")
    assert find_config(None) == Path("/etc/disaggd.toml")
    monkeypatch.delenv("DISAGGD_CONFIG")
    assert find_config(None) == Path("config.toml")


def test_a_node_is_chosen_by_name_or_as_the_only_one_of_its_role() -> None:
    config = parse_config(CLUSTER + DECODE.replace("d0", "d1").replace("8102", "8103"))
    assert config.choose("prefill", None).name == "p0"
    assert config.choose("decode", "d1").name == "d1"
    assert config.choose(None, "d1").role == "decode"


@pytest.mark.parametrize(
    ("role", "name", "message"),
    [
        ("decode", None, r"2 nodes have the role decode: choose one with --name \(d0, d1\)"),
        ("decode", "p0", "node 'p0' is a prefill node, not decode"),
        ("decode", "d7", "no node 'd7'; the file has router, p0, d0, d1"),
        (None, None, "give --role or --name"),
    ],
)
def test_an_ambiguous_choice_names_the_candidates(role: str | None, name: str | None, message: str) -> None:
    config = parse_config(CLUSTER + DECODE.replace("d0", "d1").replace("8102", "8103"))
    with pytest.raises(ConfigError, match=message):
        config.choose(role, name)  # type: ignore[arg-type]


@pytest.mark.parametrize(("path", "name"), [("builtin:tiny", "tiny"), ("/models/Qwen3-0.6B/", "Qwen3-0.6B"), ("llama", "llama")])
def test_a_model_is_called_after_its_path(path: str, name: str) -> None:
    assert parse_config(f'[model]\npath = "{path}"\n{CLUSTER}').model.served_name == name


def test_a_port_range_reads_as_it_was_written() -> None:
    assert str(PortRange.parse("18500-18999")) == "18500-18999"
    assert PortRange.parse("18500-18999") == (18500, 18999)


def test_each_rank_has_a_device_of_its_own() -> None:
    of_cpus, of_gpus = (
        parse_config(CLUSTER + "tp = 2").node("d0"),
        parse_config(CLUSTER + 'tp = 2\ndevices = ["cuda:1", "cuda"]').node("d0"),
    )
    assert (of_cpus.rank_devices, of_cpus.is_gpu) == (("cpu", "cpu"), False)
    assert (of_gpus.rank_devices, of_gpus.is_gpu, of_gpus.kv_cache_bytes) == (("cuda:1", "cuda"), True, None)
    alone = parse_config(CLUSTER + 'devices = ["cuda:3"]').node("d0")
    assert (alone.rank_devices, alone.is_gpu) == (("cuda:3",), True)


def test_every_rank_needs_its_own_ports() -> None:
    """One of the prefill node and three of the decode node, each with an agent for pushes one way and another for the way back."""
    parse_config(CLUSTER + 'tp = 3\n[transfer]\nport_range = "18500-18531"')
    with pytest.raises(ConfigError, match=r"port_range 18500-18530 is too small: the nodes on 127.0.0.1 need 32 ports"):
        parse_config(CLUSTER + 'tp = 3\n[transfer]\nport_range = "18500-18530"')
