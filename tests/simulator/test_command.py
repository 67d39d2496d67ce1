"""`disaggd simulate` as users call it."""

import json
from pathlib import Path

import pytest

from disaggd.cli import _run

ROWS = "\n".join(f"2023-11-16 18:17:{2 * i:02d}.0000000,{200 + 150 * i},{5 + i}" for i in range(12))
NODES = """
[disaggregation]
policy = "never"
""" + "".join(
    f'[[node]]\nname = "{name}"\nrole = "{role}"\nlisten = "127.0.0.1:{port}"\n'
    for name, role, port in (("r", "router", 8000), ("p0", "prefill", 8001), ("d0", "decode", 8002), ("d1", "decode", 8003))
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{ROWS}\n")
    return path


def simulate(*arguments: object) -> int:
    return _run(["simulate", *map(str, arguments)])


def test_it_shows_a_row_for_each_policy(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--trace", trace, "--policy", "always", "--policy", "threshold:600", "--ttft-slo-ms", 1000, "--itl-slo-ms", 250) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "azure.csv on 1P1D; good: TTFT ≤ 1000 ms and every ITL ≤ 250 ms; times in ms"
    assert [line.split()[0] for line in lines[3:]] == ["always", "threshold:600"]


def test_it_says_why_requests_failed_and_each_warning_once(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pool of 8 blocks: too small to measure a node in, and for most of the prompts."""
    size = 8 * 64 * 2 * 12 * 4 * 64 * 2
    assert simulate("--trace", trace, "--policy", "always", "--policy", "never", "--nodes", "2P2D", "--kv-cache", size) == 0
    shown = capsys.readouterr()
    always, never = [line for line in shown.out.splitlines() if line.startswith("failed under ")]
    assert (
        always.startswith("failed under always: ") and "the prompt has … tokens, but the KV pool less one token of output holds …" in always
    )
    assert never.startswith("failed under never: ")
    warnings = [line for line in shown.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(set(warnings)) >= 1 and "too small to measure" in warnings[0]


def test_without_policies_it_compares_the_clusters_own_with_others(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--trace", trace, "--requests", 2) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:]]
    assert set(rows) >= {"always", "never", "threshold:128", "threshold:512", "threshold:2048"} and len(rows) == len(set(rows))


def test_the_same_command_prints_the_same_bytes(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = set()
    for _ in range(2):
        assert simulate("--trace", trace, "--nodes", "2P2D", "--json", "--rate-scale", 8) == 0
        printed.add(capsys.readouterr().out)
    assert len(printed) == 1


def test_json_has_every_figure(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--trace", trace, "--policy", "always", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    (result,) = report["results"]
    assert (report["trace"], report["nodes"]) == ("azure.csv", "1P1D")
    assert (result["whole"]["requests"], result["whole"]["failed"], result["whole"]["remote_share"]) == (12, 0, 1.0)
    assert result["whole"]["ttft_ms"]["p50"] > 0 and result["before"] is None


def test_every_request_is_a_line_of_outcomes(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "outcomes.jsonl"
    assert simulate("--trace", trace, "--policy", "always", "--policy", "never", "--outcomes", path) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["policy"] for line in lines] == ["always"] * 12 + ["never"] * 12
    assert all(line["ttft_ms"] > 0 and len(line["gaps_ms"]) == line["output_tokens"] - 1 for line in lines)


def test_a_link_that_slows_down_has_halves(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = ("--slow-link-at", 0.5, "--slow-link-mbit", 10)
    assert simulate("--trace", trace, "--policy", "always", "--json", *slow) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["before"]["requests"], result["after"]["requests"]) == (6, 6)
    assert result["after"]["itl_ms"]["max"] > 10 * result["before"]["itl_ms"]["max"]


def test_a_file_says_what_the_cluster_is(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text(NODES)
    assert simulate("--trace", trace, "--config", config, "--json", "--policy", "never") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nodes"] == "1P2D"


def test_policies_and_ways_to_route_are_compared_each_with_each(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ("--policy", "always", "--policy", "never", "--routing", "cost", "--routing", "round_robin")
    assert simulate("--trace", trace, "--nodes", "1P2D", "--requests", 2, "--json", *ways) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["whole"]["policy"] for result in results] == ["always", "always, round_robin", "never", "never, round_robin"]


def test_a_cluster_without_a_file_has_the_slos_as_its_targets(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts beside streams are cut so that no step takes longer."""
    longest = []
    for slo in ((), ("--itl-slo-ms", 60)):
        assert simulate("--trace", trace, "--policy", "never", "--rate-scale", 8, "--json", *slo) == 0
        longest.append(json.loads(capsys.readouterr().out)["results"][0]["whole"]["itl_ms"]["max"])
    assert longest[0] > 100 and longest[1] <= 60


def test_longer_lengths_take_longer(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means = []
    for scale in (0.5, 1.0):
        assert simulate("--trace", trace, "--policy", "never", "--json", "--length-scale", scale) == 0
        means.append(json.loads(capsys.readouterr().out)["results"][0]["whole"]["ttft_ms"]["mean"])
    assert means[0] < means[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "sometimes"), "'sometimes' is no policy"),
        (("--nodes", "1D"), "'1D' is no cluster"),
        (("--nodes", "3P0D"), "'3P0D' is no cluster"),
        (("--kv-cache", "much"), "--kv-cache"),
        (("--kv-cache", "1KiB"), "less than one block"),
        (("--kv-share", "1e-9"), "less than one block"),
        (("--kv-cache", "1MiB", "--kv-share", "1"), "give one of them"),
        (("--routing", "random"), "--routing"),
        (("--slow-link-at", "0.5"), "go together"),
        (("--costs", "nowhere.toml"), "nowhere.toml: no such file"),
        (("--outcomes", "no/such/directory/file"), "cannot be written"),
        (("--config", "nowhere.toml"), "no such file"),
        (("--rate-scale", "0"), "--rate-scale"),
        (("--config", "nowhere.toml", "--nodes", "1P1D"), "give one of them"),
    ],
)
def test_a_mistake_is_a_line_and_exit_code_2(
    trace: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate("--trace", trace, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_trace_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate() == 2
    assert "--trace" in capsys.readouterr().err


def test_a_trace_that_is_not_there_is_told_in_the_systems_words_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--trace", "nowhere.jsonl") == 2
    assert "nowhere.jsonl: cannot be read: No such file or directory\n" in capsys.readouterr().err
