from pathlib import Path

import pytest

from disaggd.errors import ConfigError
from disaggd.simulator.traces import Lengths, Scale, distinct_tokens, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.4799600,3180,8
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [0, 3]}

{"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [0, 4]}
"""


def trace(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_an_azure_trace(tmp_path: Path) -> None:
    rows = read_trace(trace(tmp_path, "azure.csv", AZURE), None, Scale())
    assert rows == [Lengths(num_input=4808, num_output=10), Lengths(arrival_s=pytest.approx(0.5), num_input=3180, num_output=8)]


def test_a_mooncake_trace(tmp_path: Path) -> None:
    rows = read_trace(trace(tmp_path, "mooncake.jsonl", MOONCAKE), None, Scale())
    first = Lengths(num_input=700, num_output=5, blocks=(0, 3))
    assert rows == [first, Lengths(arrival_s=2.0, num_input=600, num_output=7, blocks=(0, 4))]


def test_the_first_rows_only(tmp_path: Path) -> None:
    assert len(read_trace(trace(tmp_path, "azure.csv", AZURE), 1, Scale())) == 1


def test_a_trace_is_fitted_to_the_machine(tmp_path: Path) -> None:
    scale = Scale(time=4, length=0.1, max_input=400, max_output=9)
    rows = read_trace(trace(tmp_path, "azure.csv", AZURE), None, scale)
    assert rows == [Lengths(num_input=400, num_output=1), Lengths(arrival_s=pytest.approx(2.0), num_input=318, num_output=1)]
    assert scale.block == 51


def test_the_working_set_counts_what_is_shared_once() -> None:
    first, second = Lengths(num_input=20, num_output=1, blocks=(1, 2)), Lengths(num_input=14, num_output=1, blocks=(1, 3))
    assert distinct_tokens([first, second, Lengths(num_input=5, num_output=1)], 8) == (8 + 8 + 4) + 6 + 5


def test_rows_out_of_order_come_in_order(tmp_path: Path) -> None:
    lines = AZURE.splitlines()
    rows = read_trace(trace(tmp_path, "azure.csv", "\n".join([lines[0], lines[2], lines[1]])), None, Scale())
    assert [row.num_input for row in rows] == [4808, 3180]
    assert rows[0].arrival_s == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trace.csv", "", "no rows"),
        ("trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows"),
        ("trace.csv", "a,b\n1,2\n", "no column 'TIMESTAMP'"),
        ("trace.csv", AZURE + "yesterday,1,2\n", "line 4"),
        ("trace.csv", AZURE + "2023-11-16 18:17:05,many,2\n", "line 4"),
        ("trace.csv", AZURE + "2023-11-16 18:17:05,1\n", "line 4"),
        ("trace.csv", AZURE + "2023-11-16 18:17:05,0,2\n", "line 4: 0 prompt and 2 output tokens cannot be"),
        ("trace.jsonl", "{", "line 1"),
        ("trace.jsonl", MOONCAKE + '{"timestamp": 1}\n', "line 4: Object missing required field `input_length`"),
        ("trace.jsonl", '{"timestamp": 0, "input_length": -5, "output_length": 1, "hash_ids": []}', "line 1: -5 prompt"),
        ("trace.parquet", "", "not a trace"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = trace(tmp_path, name, text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path, None, Scale())
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(path, None, Scale())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "trace.csv", None, Scale())
