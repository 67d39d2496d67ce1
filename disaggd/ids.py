"""Names for look-alike values, shared by every floor of the house. Knows nothing but the standard library."""

from typing import NewType

BlockId = NewType("BlockId", int)
"""Index of a block in one node's KV pool."""

Token = NewType("Token", int)
"""A token id of the model's vocabulary."""

SeqId = NewType("SeqId", str)
"""`<router incarnation>-<counter>`: unique over the life of a cluster; the same on every node that works for a request."""

NodeName = NewType("NodeName", str)
"""A node's name in the TOML file."""

Incarnation = NewType("Incarnation", str)
"""Drawn at every process start: two starts of the same node never share one."""

AgentId = NewType("AgentId", str)
"""Drawn for every NIXL agent: rebuilding an agent gives a new one."""

HandleId = NewType("HandleId", int)
"""A write of one NIXL agent; counted per agent."""

GrantToken = NewType("GrantToken", bytes)
"""16 random bytes that name one grant on the wire; never used twice."""

BlockHash = NewType("BlockHash", bytes)
"""16 bytes that name a full block's tokens and all before them, the same on every node that serves the same model."""
