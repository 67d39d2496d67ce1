"""The prefill node's process: its role, with the engine that the file asks for."""

from collections.abc import Callable

import uvloop

from disaggd.clock import lease_clock
from disaggd.config import Config, NodeConfig
from disaggd.engine.build import LoadedEngine
from disaggd.roles.assembly import prefill_role
from disaggd.roles.compute import Outbox
from disaggd.roles.node import run_engine_node
from disaggd.roles.prefill_role import PrefillRole
from disaggd.transfer.landing_memory import LandingMemory
from disaggd.transfer.messages import TransferCommand


def run(config: Config, node: NodeConfig) -> None:
    """Serve a prefill node until SIGTERM or SIGINT. Raises DisaggdError."""

    def make_role(
        loaded: LoadedEngine, staging: LandingMemory | None, outbox: Outbox, submit: Callable[[TransferCommand], None]
    ) -> PrefillRole:
        """`staging` is the transfer thread's alone."""
        return prefill_role(
            config,
            node,
            loaded.engine,
            kv=loaded.kv_spec,
            vocab_size=loaded.spec.vocab_size,
            outbox=outbox,
            submit=submit,
            mark=loaded.stream.mark,
            clock=lease_clock,
            patterns=loaded.patterns,
        )

    uvloop.run(run_engine_node(config, node, make_role))
