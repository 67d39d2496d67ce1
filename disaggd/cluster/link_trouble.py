"""Why there is no link to a node, in words for who has to mend it: what is meant by the error, and where to look."""

import errno

from disaggd.config import NodeConfig
from disaggd.errors import HelloRefused

_HELLO_WORDS = {
    "model_id": "it serves another model, {theirs}, and this router {ours}: [model] path, dtype and weights must be the same in both files",
    "secret": "its [cluster] secret is another",
    "version": "its disaggd speaks version {theirs} of the protocol, and this router {ours}",
    "name": "it calls itself {theirs}, and this file calls it {ours}",
    "role": "it is a {theirs} node, and this file has it as {ours}",
}
"""By the field in which the two ends differ. KV's own are `kv.…`."""


def in_plain_words(error: Exception, why: str, node: NodeConfig) -> str:
    """`why` is what the log says of `error`."""
    if isinstance(error, HelloRefused):
        words = _HELLO_WORDS.get(error.field, "its {field} is {theirs}, and by this router's file {ours}: its own file differs")
        return words.format(field=error.field.removeprefix("kv."), ours=error.ours, theirs=error.theirs)
    if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
        return f"nothing listens at {node.listen}: it has not started, or has ended; its log says why"
    if isinstance(error, TimeoutError):
        return f"{node.listen}: {why}; its host is down or a firewall is in between, or its process hangs"
    return f"{node.listen}: {why}"
