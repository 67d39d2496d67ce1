"""Whoever has to mend a link reads what is meant, and where to look."""

import errno

import pytest

from disaggd.cluster.handshake import SecretRefused
from disaggd.cluster.link_trouble import in_plain_words
from disaggd.config import NodeConfig
from disaggd.errors import HelloRefused
from disaggd.ids import NodeName
from disaggd.units import Address

NODE = NodeConfig(name=NodeName("d0"), role="decode", listen=Address("10.0.0.2:8101"))


@pytest.mark.parametrize(
    ("error", "why", "words"),
    [
        (
            HelloRefused("model_id", "a", "b"),
            "",
            "it serves another model, b, and this router a: [model] path",
        ),
        (SecretRefused(), "", "its [cluster] secret is another"),
        (HelloRefused("version", 5, 4), "", "its disaggd speaks version 4 of the protocol, and this router 5"),
        (HelloRefused("name", "d0", "d1"), "", "it calls itself d1, and this file calls it d0"),
        (HelloRefused("role", "decode", "prefill"), "", "it is a prefill node, and this file has it as decode"),
        (HelloRefused("kv.block_size", 64, 2048), "", "its block_size is 2048, and by this router's file 64: its own file differs"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "", "nothing listens at 10.0.0.2:8101: it has not started"),
        (TimeoutError(), "no answer within 5 s", "10.0.0.2:8101: no answer within 5 s; its host is down or a firewall is in between"),
        (OSError(errno.EHOSTUNREACH, "x"), "No route to host", "10.0.0.2:8101: No route to host"),
        (ValueError("x"), "undecodable frame", "10.0.0.2:8101: undecodable frame"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_cause_has_words_of_its_own(error: Exception, why: str, words: str) -> None:
    assert in_plain_words(error, why, NODE).startswith(words)
