"""The command line: what a user sees, and the exit code that a script sees. Real processes where imports matter."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

import disaggd
from disaggd import cli, rank_check
from disaggd.api_keys import key_table
from disaggd.engine.comparison import Comparison, Difference
from disaggd.errors import HelloRefused, ModelError, ResourceError
from tests.support.certificates import make_certificates

ROOT = Path(__file__).parent.parent
ROUTER = '[[node]]\nname = "router"\nrole = "router"\nlisten = "127.0.0.1:8000"\n'
DECODE = '[[node]]\nname = "d0"\nrole = "decode"\nlisten = "127.0.0.1:8102"\nkv_cache = "32MiB"\n'
PREFILL = '[[node]]\nname = "p0"\nrole = "prefill"\nlisten = "127.0.0.1:8101"\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text('[model]\ndtype = "float32"\n' + ROUTER + DECODE)
    return path


def disaggd_process(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "disaggd", *arguments]
    environ = {"PYTHONPATH": f"{path}:{ROOT}"}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environ)


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Stands in for the roles' modules, and for the re-execution; records who was asked to serve what."""
    served: list[tuple[str, str]] = []

    def import_module(name: str) -> SimpleNamespace:
        return SimpleNamespace(run=lambda config, node: served.append((name, node.name)))

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    monkeypatch.setattr(cli, "reexec_with", lambda wanted: None)
    monkeypatch.setattr(cli, "configure_logging", lambda node: None)
    return served


def run(*arguments: str) -> int:
    return cli._run([*arguments])


def test_a_role_serves_its_node(config: Path, roles: list[tuple[str, str]]) -> None:
    assert run("--role", "decode", "--config", str(config)) == 0
    assert run("--name", "router", "--config", str(config)) == 0
    assert roles == [("disaggd.roles.decode", "d0"), ("disaggd.roles.router", "router")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --role or --name to be one node, or a command: up, check, doctor, generate, key, trace, simulate"),
        (["--role", "judge"], "'judge' is not one of 'router', 'prefill', 'decode'"),
        (["--role", "prefill"], "disaggd: the file has no prefill node"),
        (["--name", "d9"], "disaggd: no node 'd9'; the file has router, d0"),
        (["--role", "router", "check"], "--role and --name mean one node"),
        (["chekc"], "No such command 'chekc'"),
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", "x", "--max-tokens", "0"], "'--max-tokens': 0 is not in the range x>=1"),
    ],
)
def test_bad_usage_exits_2_and_says_why(config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run("--config", str(config), *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_bad_file_is_one_line_and_exits_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(ROUTER + DECODE + "blok_size = 16\n")
    assert run("check", "--config", str(config)) == 2
    assert capsys.readouterr().err == f"disaggd: {config}: node[1] (d0).blok_size: unknown key (block_size?)\n"


def test_a_missing_file_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--config", "/absent.toml") == 2
    assert capsys.readouterr().err == "disaggd: /absent.toml: no such file (name one with --config or $DISAGGD_CONFIG)\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ResourceError("port taken"), 3),
        (ModelError("no shard"), 2),
        (HelloRefused("dtype", "float32", "bfloat16"), 1),
        (KeyboardInterrupt(), 130),
        (ExceptionGroup("a role's tasks", [ExceptionGroup("inner", [ResourceError("port taken")])]), 3),
    ],
)
def test_what_ends_a_role_becomes_the_exit_code(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_serve", fail)
    assert run("--role", "decode", "--config", str(config)) == code
    assert len(capsys.readouterr().err.split("\n")) == 2  # one line, or none and the end of the terminal's ^C


def test_a_fault_of_ours_is_not_hidden(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ExceptionGroup("a role's tasks", [KeyError("ours"), ResourceError("port taken")])

    monkeypatch.setattr(cli, "_serve", fail)
    with pytest.raises(ExceptionGroup):
        run("--role", "decode", "--config", str(config))


def test_check_shows_the_resolved_cluster(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--config", str(config)) == 0
    shown = capsys.readouterr().out
    assert "d0" in shown
    assert "127.0.0.1:8102" in shown
    assert "32 MiB" in shown
    assert "every prompt is prefilled by its decode node" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('kv_cache = "1KiB"', "node 'd0': kv_cache (1 KiB) is less than one block"),
        ('[model]\npath = "builtin:huge"', "builtin:huge: no such built-in model"),
        ('[transfer]\ntransports = "pigeon"', "cluster.toml: [transfer] transports = 'pigeon'"),
        ('device = "cuda"\n[transfer]\nstaging = "100KiB"', "transfer.staging: 102,400 bytes are less than one write takes; it must have"),
        ("tp = 9", "cluster.toml: node 'd0': tp = 9: the model has 4 heads, too few for so many ranks; at most 4"),
        ("[model]\nmax_model_len = 5000", "cluster.toml: model.max_model_len: 5,000 is more than the model's own limit of 4,096 tokens"),
    ],
)
def test_check_refuses_what_no_node_could_start_with(config: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    config.write_text(ROUTER + DECODE.replace('kv_cache = "32MiB"\n', "") + line)
    assert run("check", "--config", str(config)) == 2
    assert message in capsys.readouterr().err


UNLIKE = ROUTER + PREFILL + "block_size = 32\n" + DECODE + '[transfer]\nstaging = "1KiB"\n'
NO_WAY = "node 'p0', which writes to 'd0': transfer.staging: 1,024 bytes are less than one write takes in other blocks; it must have"


def test_staging_memory_that_holds_no_write_to_other_blocks_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(UNLIKE)
    assert run("check", "--config", str(config)) == 2
    assert NO_WAY in capsys.readouterr().err
    config.write_text(UNLIKE.replace("block_size = 32", ""))
    assert run("check", "--config", str(config)) == 0, "blocks alike are not repacked"
    config.write_text(UNLIKE.replace("1KiB", "1MiB"))
    assert run("check", "--config", str(config)) == 0


def test_a_node_that_could_never_hand_over_does_not_start(config: Path) -> None:
    config.write_text(UNLIKE)
    process = disaggd_process("--name", "p0", "--config", str(config))
    assert process.returncode == 2
    assert NO_WAY in process.stderr


def test_check_opens_the_tls_files_of_this_hosts_nodes_as_they_would(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_certificates(tmp_path)
    tables = '[router]\ntls_cert = "router.pem"\ntls_key = "router.key"\n'
    tables += '[cluster]\ntls_cert = "d0.pem"\ntls_key = "d0.key"\ntls_ca = "ca.pem"\n'
    config.write_text(tables + ROUTER + DECODE)
    assert run("check", "--config", str(config)) == 0
    for file, message in (
        ("ca.pem", f"cluster.tls_ca: {tmp_path}/absent: No such file or directory"),
        ("d0.key", f"cluster.tls_cert, tls_key: {tmp_path}/d0.pem, {tmp_path}/p0.key: key values mismatch"),
        ("router.key", f"router.tls_cert, tls_key: {tmp_path}/router.pem, {tmp_path}/p0.key: key values mismatch"),
    ):
        config.write_text(tables.replace(file, "absent" if file == "ca.pem" else "p0.key") + ROUTER + DECODE)
        assert run("check", "--config", str(config)) == 2
        assert message in capsys.readouterr().err
    elsewhere = 'secret = "0123456789abcdef"\n' + (ROUTER + DECODE).replace("127.0.0.1", "192.0.2.7") + '[transfer]\ndevices = "lo"\n'
    config.write_text(tables.replace("ca.pem", "absent").replace("router.key", "absent") + elsewhere)
    assert run("check", "--config", str(config)) == 0


def test_check_shows_ranks_and_verification(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(ROUTER + DECODE + "tp = 2\nthreads = 3\n[transfer]\nverify = true\n")
    assert run("check", "--config", str(config)) == 0
    shown = capsys.readouterr().out
    assert "2 ranks x 3" in shown and "32 MiB of all ranks" in shown and ", every block verified" in shown


def test_check_says_what_lands_in_fp8_and_how_long_it_may_be(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefill = DECODE.replace('"d0"', '"p0"').replace("decode", "prefill").replace("8102", "8101")
    config.write_text('[transfer]\nwire_dtype = "fp8"\nstaging = "1MiB"\n' + ROUTER + prefill + DECODE.replace("32MiB", "1GiB"))
    assert run("check", "--config", str(config)) == 0
    shown = capsys.readouterr().out
    assert ", in fp8 to decode nodes" in shown
    # As it is, in bfloat16, as much holds 320.
    (warning,) = [line for line in shown.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: node 'd0': transfer.staging holds 640 tokens: longer prompts are never prefilled elsewhere")


def test_check_warns_of_what_this_host_lacks(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text('[transfer]\ndevices = "lo,eth77"\n' + ROUTER + DECODE.replace("32MiB", "1MiB") + "cpus = [1023]\n")
    assert run("check", "--config", str(config)) == 0
    small, cpus, device = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: node 'd0': ")]
    assert "kv_cache holds 320 tokens, but one request may have 4,096" in small
    assert "cpus [1023] are not among those that a process may use here" in cpus
    assert "this host has no network device 'eth77' (transfer.devices); it has lo" in device


def test_check_warns_of_staging_memory_that_holds_no_whole_request(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = DECODE.replace("32MiB", "1GiB") + 'device = "cuda"\n'
    prefill = gpu.replace('"d0"', '"p0"').replace("decode", "prefill").replace("8102", "8101")
    config.write_text('[transfer]\nstaging = "1MiB"\n' + ROUTER + prefill + gpu)
    assert run("check", "--config", str(config)) == 0
    shown = capsys.readouterr().out
    assert "a GPU's through 1 MiB of its host" in shown
    (warning,) = [line for line in shown.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: node 'd0': transfer.staging holds 320 tokens: longer prompts are never prefilled elsewhere")
    config.write_text('[transfer]\nstaging = "64MiB"\n' + ROUTER + gpu)
    assert run("check", "--config", str(config)) == 0
    assert "staging holds" not in capsys.readouterr().out


def test_check_asks_nothing_of_this_host_for_a_node_elsewhere(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote = DECODE.replace("127.0.0.1", "192.0.2.7") + "cpus = [1023]\n"
    config.write_text('[transfer]\ndevices = "eth77"\n[cluster]\nsecret = "0123456789abcdef"\n' + ROUTER + remote)
    assert run("check", "--config", str(config)) == 0
    assert "warning" not in capsys.readouterr().out.replace("warning: node 'd0': kv_cache", "")


def test_check_misses_a_tokenizer(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (ROOT / "disaggd/model/builtin/tiny").iterdir():
        if file.is_file() and file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    config.write_text('[model]\npath = "."\n' + ROUTER + DECODE)
    assert run("check", "--config", str(config)) == 2
    assert "tokenizer.json: missing" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["40", "80"])
def test_check_cuts_no_name_and_no_address(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    name = "a-name-of-fifty-letters-that-no-terminal-is-wide-enough-for"
    address = "a.host.in.a.domain.with.a.rather.long.name.example.com:8102"
    decode = DECODE.replace("d0", name).replace("127.0.0.1:8102", address)
    config.write_text('[transfer]\ndevices = "lo"\n[cluster]\nsecret = "0123456789abcdef"\n' + ROUTER + decode)
    assert run("check", "--config", str(config)) == 0
    shown = capsys.readouterr().out
    assert name in shown
    assert address in shown
    assert "…" not in shown


def test_the_policy_fits_a_terminal(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text('[disaggregation]\npolicy = "threshold"\nmax_local_prefill_tokens = 100000\n' + ROUTER + DECODE + PREFILL)
    assert run("check", "--config", str(config)) == 0
    [policy] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("policy")]
    assert "prompts over 100000 uncached tokens" in policy
    assert len(policy) <= 80


@pytest.mark.parametrize("command", [[], ["up"], ["check"], ["generate"]])
def test_help_reads_well(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: disaggd")
    assert "$DISAGGD_CONFIG, else ./config.toml" in " ".join(shown.split())


def test_the_version_is_the_packages() -> None:
    process = disaggd_process("--version")
    assert (process.stdout, process.returncode) == (f"disaggd {disaggd.__version__}\n", 0)


@pytest.mark.parametrize(("module", "arguments"), [("click", ["--version"]), ("torch", ["--role", "decode"])])
def test_ctrl_c_during_an_import_is_quiet(config: Path, tmp_path: Path, module: str, arguments: list[str]) -> None:
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('went on')\n")
    process = disaggd_process("--config", str(config), *arguments, path=tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")


@pytest.mark.parametrize(("code", "shown"), [(0, 0), (3, 3), (130, 0)])
def test_make_run_takes_ctrl_c_for_a_good_end_and_nothing_else(monkeypatch: pytest.MonkeyPatch, code: int, shown: int) -> None:
    def end() -> None:
        assert sys.argv == ["disaggd", "up"]
        sys.exit(code)

    monkeypatch.setattr(cli, "main", end)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools/run.py"))
    assert (caught.value.code or 0) == shown


def test_a_key_is_shown_once_and_its_table_can_be_appended_to_the_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("key", "alice") == 0
    shown = capsys.readouterr()
    key = next(word for word in shown.err.split() if word.startswith("sk-disaggd-"))
    assert shown.out == key_table("alice", key)
    for name in ("no name", 'bad "name', "", "a\\nb"):
        assert run("key", name) == 2
        assert f"key[0] ({name}).name: expected up to 63" in capsys.readouterr().err
    (config.parent / "keys.toml").write_text(shown.out)
    config.write_text('[router]\napi_keys = "keys.toml"\n' + config.read_text())
    assert run("check", "--config", str(config)) == 0
    assert "clients  http, 1 API key, metrics for admins" in capsys.readouterr().out
    (config.parent / "keys.toml").write_text("[[key]]")
    assert run("check", "--config", str(config)) == 2
    assert f"router.api_keys: {config.parent}/keys.toml: key[0]: table missing required field name" in capsys.readouterr().err


def test_check_warns_of_a_router_that_anybody_may_use(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text('[cluster]\nsecret = "0123456789abcdef"\n' + config.read_text().replace("127.0.0.1:8000", "0.0.0.0:8000"))
    assert run("check", "--config", str(config)) == 0
    assert "node 'router': anybody who reaches 0.0.0.0:8000 may use the cluster (router.api_keys)" in capsys.readouterr().out


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` here, without the re-execution that would replace the tests."""
    monkeypatch.setattr(cli, "reexec_with", lambda wanted: None)
    monkeypatch.setattr(cli, "configure_logging", lambda node: None)


@pytest.mark.process
@pytest.mark.usefixtures("in_process")
def test_check_compares_ranks_with_one(config: Path, capsys: pytest.CaptureFixture[str]) -> None:

    assert run("check", "--config", str(config), "--tp", "2") == 0
    shown = capsys.readouterr().out
    assert "d0" in shown, "the cluster is shown, too"
    assert "tp = 2 beside tp = 1: " in shown and "all 64 the same" in shown
    assert "KV       of a token 6,144 bytes with one rank; by rank 3,072, 3,072" in shown


@pytest.mark.usefixtures("in_process")
def test_check_of_more_ranks_than_there_can_be_exits_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--config", str(config), "--tp", "9") == 2
    assert "tp = 9: the model has 4 heads" in capsys.readouterr().err
    config.write_text(config.read_text() + 'device = "cuda"\n')
    assert run("check", "--config", str(config), "--tp", "2") == 2
    assert "node 'd0': --tp 2 takes as many GPUs, but its devices are cuda" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_ranks_that_compute_something_else_make_check_exit_1(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Comparison(
        tp=2,
        dtype="float32",
        num_prompt_tokens=80,
        num_tokens=64,
        largest_logit=16.0,
        logit_error=0.5,
        num_same=60,
        first_difference=Difference(11, alone=77, together=481, margin=0.25),
        kv_token_bytes=6144,
        rank_token_bytes=(6144, 6144),
    )
    monkeypatch.setattr(rank_check, "compare_ranks", lambda *_: found)
    assert run("check", "--config", str(config), "--tp", "2") == 1
    shown = capsys.readouterr().out
    assert "at most 0.5 apart, of 16 at most: MORE than the 0.0008 that rounding explains" in shown
    assert "60 of 64 the same; number 12 is 481 in place of 77, which led by 0.25" in shown


@pytest.mark.usefixtures("in_process")
def test_generate_is_repeatable_across_processes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One engine, end to end; the other process takes seconds to import torch."""
    arguments = ("generate", "--config", str(config), "--max-tokens", "8", "--temperature", "1", "--seed", "7", "--json", "def f(x):")
    process = disaggd_process(*arguments)
    assert (process.returncode, process.stderr) == (0, "")
    assert run(*arguments) == 0
    assert capsys.readouterr().out == process.stdout
    reply = msgspec.json.decode(process.stdout)
    assert reply["model"] == "tiny"
    assert len(reply["tokens"]) == 8 or reply["finish_reason"] == "stop"


@pytest.mark.usefixtures("in_process")
def test_generate_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISAGGD_CONFIG", raising=False)
    assert run("generate", "--max-tokens", "4", "import os") == 0
    assert capsys.readouterr().out.startswith("import os")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "the prompt is empty"), ("\udcff", "the prompt is not valid UTF-8"), ("x y " * 5000, "tokens, but the model's context")],
)
def test_generate_refuses_a_bad_prompt(config: Path, prompt: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--config", str(config), prompt) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("kv_cache", "message"),
    [("32MiB", "asks for 5000 more, but the model's context holds 4096"), ("1MiB", "asks for 5000 more, but the KV pool holds 128")],
)
def test_generate_refuses_more_tokens_than_there_is_room_for(
    config: Path, kv_cache: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text().replace("32MiB", kv_cache))
    assert run("generate", "--config", str(config), "--max-tokens", "5000", "import os") == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
