"""The decode node's process: `DecodeRole` with the engine, rules and staging that the file asks for."""

import time
from collections.abc import Callable

import uvloop

from disaggd.cluster.decision import DecisionRule
from disaggd.config import Config, NodeConfig
from disaggd.engine.build import LoadedEngine
from disaggd.engine.kv_staging import KVStaging
from disaggd.roles.compute import Outbox
from disaggd.roles.decode_role import DecodeRole
from disaggd.roles.granting import Granting
from disaggd.roles.node import run_engine_node
from disaggd.transfer.messages import TransferCommand


def run(config: Config, node: NodeConfig) -> None:
    """Serve a decode node until SIGTERM or SIGINT. Raises DisaggdError."""
    rules = config.disaggregation
    rule = DecisionRule(
        policy=rules.policy, max_local_prefill_tokens=rules.max_local_prefill_tokens, max_prefill_queue=rules.max_prefill_queue
    )

    def make_role(loaded: LoadedEngine, staging: KVStaging | None, outbox: Outbox, submit: Callable[[TransferCommand], None]) -> DecodeRole:
        return DecodeRole(
            loaded.engine,
            rule,
            granting=Granting(
                node.name,
                loaded.engine,
                lease_s=config.transfer.lease_s,
                quiesce_s=config.transfer.quiesce_s,
                bytes_per_block=loaded.kv_spec.bytes_per_block,
                submit=submit,
                clock=time.monotonic,
                staging=staging,
            ),
            vocab_size=loaded.spec.vocab_size,
            outbox=outbox,
            submit=submit,
            clock=time.monotonic,
        )

    uvloop.run(run_engine_node(config, node, make_role))
