"""The prefill node's process: `PrefillRole` with the engine that the file asks for."""

import time
from collections.abc import Callable

import uvloop

from disaggd.config import Config, NodeConfig
from disaggd.engine.build import LoadedEngine
from disaggd.engine.kv_staging import KVStaging
from disaggd.roles.compute import Outbox
from disaggd.roles.node import run_engine_node
from disaggd.roles.prefill_role import PrefillRole
from disaggd.roles.pushing import Pushing
from disaggd.transfer.messages import TransferCommand


def run(config: Config, node: NodeConfig) -> None:
    """Serve a prefill node until SIGTERM or SIGINT. Raises DisaggdError."""

    def make_role(
        loaded: LoadedEngine, staging: KVStaging | None, outbox: Outbox, submit: Callable[[TransferCommand], None]
    ) -> PrefillRole:
        """`staging` is the transfer thread's alone."""
        pool = loaded.engine.pool
        return PrefillRole(
            loaded.engine,
            credit_tokens=min(pool.num_blocks * pool.block_size, 2 * loaded.engine.limits.max_model_len),
            pushing=Pushing(
                pool,
                lease_s=config.transfer.lease_s,
                quiesce_s=config.transfer.quiesce_s,
                outbox=outbox,
                submit=submit,
                clock=time.monotonic,
            ),
            vocab_size=loaded.spec.vocab_size,
            outbox=outbox,
            mark=loaded.stream.mark,
            clock=time.monotonic,
        )

    uvloop.run(run_engine_node(config, node, make_role))
