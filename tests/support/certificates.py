"""Certificates for tests, made as docs/security.md tells operators to: the recipe there is what runs here."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


@dataclass(frozen=True)
class Certificates:
    """The recipe's output: `ca.pem`, and `NAME.pem`, `NAME.key` of router, p0 and d0, all valid for 127.0.0.1."""

    directory: Path

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def links(self, node: str) -> dict[str, str]:
        """`[cluster]`'s keys, for one node."""
        return {"tls_cert": self.path(f"{node}.pem"), "tls_key": self.path(f"{node}.key"), "tls_ca": self.path("ca.pem")}


def make_certificates(directory: Path, days: int = 365) -> Certificates:
    """An authority, and three certificates that are valid for `days`. Takes half a second."""
    recipe = re.search(r"```sh\n(openssl req -x509.*?)```", PAGE.read_text(), re.DOTALL)
    assert recipe is not None
    text = re.sub(r"10\.0\.0\.\d", "127.0.0.1", recipe[1]).replace("-days 365", f"-days {days}")
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["sh", "-euc", text], cwd=directory, check=True, capture_output=True, timeout=60)
    return Certificates(directory)
