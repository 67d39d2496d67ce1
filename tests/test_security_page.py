"""docs/security.md against what it describes: keys of the files, ports of the example cluster. Its TLS recipe runs in test_tls.py."""

import re
from pathlib import Path

import msgspec
import pytest

from disaggd.api_keys import ApiKey
from disaggd.config import load_config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_key_of_a_key_is_explained() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert rows == {field.name for field in msgspec.structs.fields(ApiKey)}


@pytest.mark.parametrize("begins", ["table inet disaggd", "iptables -N disaggd"])
def test_the_firewall_covers_every_port_of_the_example_cluster(begins: str) -> None:
    config = load_config(ROOT / "config.toml")
    (rules,) = (block for block in re.findall(r"```\w*\n(.*?)```", PAGE, re.DOTALL) if block.startswith(begins))
    first, last = config.transfer.port_range
    dropped = [line for line in rules.splitlines() if "drop" in line.lower()]
    assert dropped
    for line in dropped:
        assert all(str(node.listen.port) in line for node in config.nodes_of("prefill", "decode")), line
        assert re.search(f"{first}[-:]{last}", line), line
