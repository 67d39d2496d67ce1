"""The router's rules and the engine nodes' roles, put together as the file says: around a real engine, or a simulated one.

Imports no torch, and starts nothing: threads, links and processes are `node.py`'s and `router.py`'s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from disaggd.cluster.decision import DecisionRule
from disaggd.cluster.moves import DispatchRules
from disaggd.cluster.routing import RoutingWeights
from disaggd.config import Config, NodeConfig
from disaggd.engine.engine import Engine
from disaggd.ids import NodeName
from disaggd.roles.compute import Outbox
from disaggd.roles.decode_role import DecodeRole
from disaggd.roles.granting import Granting
from disaggd.roles.landing import Landings
from disaggd.roles.pair_check import PairCheck
from disaggd.roles.pattern_intake import PatternIntake, Patterns
from disaggd.roles.pattern_pushes import PatternPushes, WayOut
from disaggd.roles.prefill_role import PrefillRole
from disaggd.roles.prefixes import PrefixIntake
from disaggd.roles.pushing import Pushing, layer_groups
from disaggd.transfer.landing_memory import LandingMemory
from disaggd.transfer.layout import KVSpec, in_fp8
from disaggd.transfer.messages import IsReady, PairOpened, TransferCommand, at_once
from disaggd.transfer.share import block_bytes

Submit = Callable[[TransferCommand], None]
Clock = Callable[[], float]
Mark = Callable[[], IsReady]


def dispatch_rules(config: Config, vocab_size: int) -> DispatchRules:
    rules = config.disaggregation
    return DispatchRules(
        max_retries=rules.max_retries,
        grant_patience_s=rules.grant_patience_s,
        request_timeout_s=config.router.request_timeout_s,
        stall_s=config.router.stall_s,
        max_prefill_queue=rules.max_prefill_queue,
        max_prefill_queue_tokens=rules.max_prefill_queue_tokens,
        check_pairs=config.transfer.check_pairs,
        prefix_push=rules.prefix_push,
        queue_aging_s=rules.queue_aging_s,
        ttft_target_s=rules.ttft_target_ms / 1e3,
        weights=RoutingWeights(prefill=config.routing.prefill_weight, load=config.routing.load_weight),
        kv_overcommit=config.router.kv_overcommit,
        round_robin=config.routing.decode == "round_robin",
        vocab_size=vocab_size,
    )


def decision_rule(config: Config) -> DecisionRule:
    rules = config.disaggregation
    return DecisionRule(
        policy=rules.policy, max_local_prefill_tokens=rules.max_local_prefill_tokens, max_prefill_queue=rules.max_prefill_queue
    )


def decode_role(
    config: Config,
    node: NodeConfig,
    engine: Engine,
    *,
    kv: KVSpec,
    vocab_size: int,
    outbox: Outbox,
    submit: Submit,
    clock: Clock,
    staging: LandingMemory | None = None,
    patterns: Patterns | None = None,
    mark: Mark = lambda: at_once,
) -> DecodeRole:
    """`staging` is what peers write where they cannot write the engine's pool. Without `patterns` its pairs are not checked."""
    transfer = config.transfer
    granting = Granting(
        node.name,
        engine,
        lease_s=transfer.lease_s,
        quiesce_s=transfer.quiesce_s,
        bytes_per_block=block_bytes(in_fp8(kv) if config.lands_in_fp8(node) else kv, node.tp),
        submit=submit,
        clock=clock,
        staging=staging,
        verify=transfer.verify,
    )
    wires = _Wires(config, node, engine, kv, outbox, submit, mark, clock)
    pushing = wires.pushing()
    return DecodeRole(
        engine,
        decision_rule(config),
        granting=granting,
        pushing=pushing,
        checks=wires.pair_check(pushing, granting.landings, granting.agents, patterns),
        layer_groups=layer_groups(kv.num_layers, transfer.layer_group),
        vocab_size=vocab_size,
        outbox=outbox,
        submit=submit,
        clock=clock,
    )


def prefill_role(
    config: Config,
    node: NodeConfig,
    engine: Engine,
    *,
    kv: KVSpec,
    vocab_size: int,
    outbox: Outbox,
    submit: Submit,
    mark: Mark,
    clock: Clock,
    patterns: Patterns | None = None,
) -> PrefillRole:
    """Without `patterns` its pairs are not checked."""
    pool, limits, transfer = engine.pool, engine.limits, config.transfer
    wires = _Wires(config, node, engine, kv, outbox, submit, mark, clock)
    pushing = wires.pushing()
    prefixes = PrefixIntake(
        node.name,
        engine,
        lease_s=transfer.lease_s,
        quiesce_s=transfer.quiesce_s,
        outbox=outbox,
        submit=submit,
        clock=clock,
        verify=transfer.verify,
    )
    return PrefillRole(
        engine,
        credit_tokens=min(pool.num_blocks * pool.block_size, 2 * limits.max_model_len),
        pushing=pushing,
        prefixes=prefixes,
        checks=wires.pair_check(pushing, Landings(pool, None), prefixes.agents, patterns),
        vocab_size=vocab_size,
        outbox=outbox,
        mark=mark,
        clock=clock,
    )


@dataclass(frozen=True, slots=True)
class _Wires:
    """What both roles are made around, and what of them is the same in both."""

    config: Config
    node: NodeConfig
    engine: Engine
    kv: KVSpec
    outbox: Outbox
    submit: Submit
    mark: Mark
    clock: Clock

    def pushing(self) -> Pushing:
        transfer = self.config.transfer
        return Pushing(
            self.engine.pool,
            max_write_tokens=self.engine.limits.max_step_tokens,
            lease_s=transfer.lease_s,
            quiesce_s=transfer.quiesce_s,
            outbox=self.outbox,
            submit=self.submit,
            clock=self.clock,
        )

    def pair_check(
        self, pushing: Pushing, landings: Landings, agents: Mapping[NodeName, PairOpened], patterns: Patterns | None
    ) -> PairCheck:
        name, transfer = self.node.name, self.config.transfer
        intake = PatternIntake(
            name,
            self.engine,
            patterns=patterns,
            landings=landings,
            agents=agents,
            lease_s=transfer.lease_s,
            quiesce_s=transfer.quiesce_s,
            outbox=self.outbox,
            submit=self.submit,
            clock=self.clock,
        )
        way = WayOut(
            transport=f"{transfer.transports} over {transfer.devices or 'lo'}",
            layer_groups=layer_groups(self.kv.num_layers, transfer.layer_group),
        )
        pushes = PatternPushes(name, self.engine, patterns=patterns, pushing=pushing, way=way, outbox=self.outbox, mark=self.mark)
        return PairCheck(intake, pushes, pushing)
