"""The command line: what it says, which node it means, and the exit code. Everything else is behind the commands.

Nothing here imports torch: the role is imported once the process has the environment that its libraries need. Nor what one command alone
wants and takes long to import: a node's process comes by here twice (`launch.reexec_with`).
"""

import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

import disaggd
from disaggd.api_keys import key_table, new_key, read_key
from disaggd.config import CONFIG_VARIABLE, DECODE_ORDERS, DEFAULT_PATH, ROLES, Config, Role, find_config, load_config, single_node
from disaggd.doctor import examine, url_of
from disaggd.errors import EXIT_INTERRUPTED, DisaggdError, InvalidRequest
from disaggd.launch import compute_environment, interrupts_raise, node_environment, pin, reexec_with
from disaggd.log import configure_logging
from disaggd.router_client import DEFAULT_URL
from disaggd.sampling import SamplingParams
from disaggd.supervisor import STOP_GRACE_S, Supervisor, banner, check_ports, local_nodes, node_command
from disaggd.toml_file import naming
from disaggd.trace import show

_CONFIG_HELP = f"The cluster's TOML file.  [default: ${CONFIG_VARIABLE}, else ./{DEFAULT_PATH}]"

_POSITIVE = click.FloatRange(min=0, min_open=True)


def _config_option(command: Any) -> Any:
    return click.option("--config", "config_path", metavar="FILE", type=click.Path(path_type=Path), help=_CONFIG_HELP)(command)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--role", type=click.Choice(ROLES), help="Be the file's node of this role; --name chooses where there are several.")
@click.option("--name", metavar="NODE", help="Be this node of the file.")
@_config_option
@click.version_option(disaggd.__version__, prog_name="disaggd", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, role: Role | None, name: str | None, config_path: Path | None) -> None:
    """Serve a large language model with prefill and decode on separate nodes.

    \b
      disaggd up                          every node of the file that lives on this host
      disaggd --role decode --name d0     one node: what a service manager starts

    Exit codes: 0 done; 1 a fault of disaggd's own, with its traceback, a request that trace cannot find or show, something that
    doctor has found, or ranks that check --tp finds to compute something else than one does; 2 bad usage, configuration or model; 3 a
    port, a peer or memory that could not be had; 130 interrupted. up ends with the code of the node that ended it.
    """
    context.obj = config_path
    if context.invoked_subcommand is None:
        if role is None and name is None:
            raise click.UsageError(f"give --role or --name to be one node, or a command: {', '.join(cli.commands)}")
        _serve(role, name, config_path)
    elif role is not None or name is not None:
        raise click.UsageError(f"--role and --name mean one node; they do not go with {context.invoked_subcommand!r}")


def _serve(role: Role | None, name: str | None, config_path: Path | None) -> None:
    path = find_config(config_path)
    config = load_config(path)
    node = config.choose(role, name)
    configure_logging(node.name)
    pin(node)
    with naming(path):
        environment = node_environment(config, node)
    reexec_with(environment)
    module = importlib.import_module(f"disaggd.roles.{node.role}")
    interrupts_raise()
    module.run(config, node)


@cli.command()
@_config_option
@click.pass_obj
def up(outer_path: Path | None, config_path: Path | None) -> int:
    """Start every node of the file that lives on this host. Ctrl-C ends them all when their requests have ended, a second one at once."""
    path = find_config(config_path or outer_path)
    config = load_config(path)
    with naming(path):
        nodes = local_nodes(config.nodes)
    check_ports(nodes)
    supervisor = Supervisor(
        nodes,
        node_command(path),
        lambda router, view: click.echo(banner(config, router, view)),
        tls=config.router.scheme == "https",
        has_keys=config.router.api_keys is not None,
        grace_s=config.cluster.drain_s + STOP_GRACE_S,
    )
    interrupts_raise()
    return asyncio.run(supervisor.run())


@cli.command()
@_config_option
@click.option(
    "--tp", type=click.IntRange(min=2), help="Compute a prompt with so many ranks and with one, too, and compare. Loads the model."
)
@click.pass_obj
def check(outer_path: Path | None, config_path: Path | None, tp: int | None) -> int:
    """Check the file and show the cluster that it describes."""
    path = find_config(config_path or outer_path)
    config = load_config(path)
    describe = importlib.import_module("disaggd.describe").describe
    if tp is None:
        interrupts_raise()
        describe(path, config)
        return 0
    node = config.nodes_of("decode")[0]
    configure_logging(node.name)
    pin(node)
    reexec_with(compute_environment(node))
    interrupts_raise()
    describe(path, config)
    rank_check = importlib.import_module("disaggd.rank_check")
    return int(rank_check.run(config, node, tp))


@cli.command()
@_config_option
@click.option(
    "--url",
    help=f"The router's.  [default: that of the file's first router, else {DEFAULT_URL}]",
    callback=lambda _, __, url: None if url is None else _checked_url(url),
)
@click.option("--key-file", type=click.Path(path_type=Path), help="Holds an API key that has admin.")
@click.option("--json", "as_json", is_flag=True, help="Print what the router answers as JSON.")
@click.pass_obj
def doctor(outer_path: Path | None, config_path: Path | None, url: str | None, key_file: Path | None, as_json: bool) -> int:
    """Have the router send a pattern over every way of KV, and show what arrives, how fast, and what is in the way.

    Harmless while requests are served: it takes blocks that are free. Exit code 0: every node is there and every way works; 1: something
    does not, and is named; 3: no router answers.
    """
    interrupts_raise()
    url = url or _router_url(config_path or outer_path)
    return 0 if examine(url, None if key_file is None else read_key(key_file), as_json=as_json) else 1


def _router_url(option: Path | None) -> str:
    """Only a file that nobody asked for may be missing."""
    path = find_config(option)
    return DEFAULT_URL if path == DEFAULT_PATH and option is None and not path.exists() else url_of(load_config(path))


@cli.command()
@click.argument("prompt")
@_config_option
@click.option("--max-tokens", type=click.IntRange(min=1), help="[default: 64, or what the context has room for]")
@click.option("--temperature", type=click.FloatRange(min=0, max=2), default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--seed", type=click.IntRange(min=0, max=2**64 - 1), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end: text, token ids, finish reason.")
@click.pass_obj
def generate(
    outer_path: Path | None, prompt: str, config_path: Path | None, max_tokens: int | None, temperature: float, seed: int, as_json: bool
) -> None:
    """Continue PROMPT with one engine in this process: no router, no cluster, no network.

    It is what a cluster's output must equal. Takes the model and a decode node's settings from the file; without a file,
    the built-in model.
    """
    config = _config_or_default(config_path or outer_path)
    node = config.nodes_of("decode")[0]
    configure_logging(node.name)
    pin(node)
    reexec_with(compute_environment(node))
    solo = importlib.import_module("disaggd.solo")
    interrupts_raise()
    try:
        solo.run(config, node, prompt, SamplingParams(temperature=temperature, seed=seed), max_tokens, as_json)
    except InvalidRequest as error:
        raise click.UsageError(error.message) from error


@cli.command()
@click.argument("name")
def key(name: str) -> None:
    """Make an API key for the client NAME: print it, once, and the table that lets it in.

    The table goes into the file that [router] api_keys names, and holds a hash: the key itself is nowhere else.
    """
    secret = new_key()
    table = key_table(name, secret)
    click.echo(f"The key, which cannot be shown again:\n\n  {secret}\n\nThe table for the file of [router] api_keys:\n", err=True)
    click.echo(table, nl=False)


@cli.command()
@click.argument("request_id", metavar="[ID]", required=False)
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The router's.", callback=lambda _, __, url: _checked_url(url))
@click.option("--key-file", type=click.Path(path_type=Path), help="Holds an API key; one with admin sees every request.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipts as JSON.")
@click.pass_obj
def trace(outer_path: Path | None, request_id: str | None, url: str, key_file: Path | None, as_json: bool) -> None:
    """Show what happened to request ID: the decision, and where its time went. Without ID, the latest requests.

    ID is a reply's id or x-request-id, or as much of its beginning as tells it from the others. Exit code 1: the router knows
    no such request, or does not show it; 3: no router answers.
    """
    interrupts_raise()
    show(url, request_id, as_json, None if key_file is None else read_key(key_file))


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise click.BadParameter(f"{url!r} is no address of a router, such as {DEFAULT_URL}")
    return url


@cli.command()
@click.option("--trace", type=click.Path(path_type=Path), required=True, help="An Azure LLM trace (.csv) or a Mooncake trace (.jsonl).")
@_config_option
@click.option("--nodes", metavar="xPyD", help="A cluster of model S, a core for each node, where there is no file.  [default: 1P1D]")
@click.option("--policy", "policies", multiple=True, help="adaptive, threshold:TOKENS, always, never.  [default: the file's, and others]")
@click.option("--requests", type=click.IntRange(min=1), help="The first so many.  [default: the whole trace]")
@click.option("--rate-scale", type=_POSITIVE, default=1.0, show_default=True, help="Requests come so many times as often.")
@click.option("--length-scale", type=_POSITIVE, default=1.0, show_default=True, help="Multiplies prompt and output lengths.")
@click.option("--max-input", type=click.IntRange(min=1), help="Cuts longer prompts.")
@click.option("--max-output", type=click.IntRange(min=1), help="Cuts longer outputs.")
@click.option("--ttft-slo-ms", type=_POSITIVE, help="A good request has its first token within this.")
@click.option("--itl-slo-ms", type=_POSITIVE, help="And every other one within this after the one before.")
@click.option("--costs", type=click.Path(path_type=Path), help="TOML: what steps and links take.  [default: model S on one core]")
@click.option("--kv-cache", metavar="SIZE", help='Of every node, such as "256MiB".')
@click.option("--kv-share", type=_POSITIVE, help="Instead: such a part of the distinct prompt tokens of the trace.")
@click.option("--routing", type=click.Choice(DECODE_ORDERS), multiple=True, help="How decode nodes are chosen.  [default: the file's]")
@click.option("--link-mbit", type=_POSITIVE, help="Rate of every KV link.  [default: that of the costs, 20,000]")
@click.option("--slow-link-at", type=click.FloatRange(0, 1), help="After this part of the requests, every KV link slows down …")
@click.option("--slow-link-mbit", type=_POSITIVE, help="… to this rate.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--outcomes", type=click.Path(path_type=Path), help="Write a line of JSON for every request to this file.")
@click.pass_obj
def simulate(outer_path: Path | None, /, config_path: Path | None, **options: Any) -> None:
    """Replay a trace of requests on this cluster in virtual time, under several policies, and compare them.

    The router's dispatcher, the nodes' roles, schedulers and pools are the real ones; computing and sending only take the time
    that a table of costs says. The same input has the same outcome. See docs/simulator.md.
    """
    experiment = importlib.import_module("disaggd.simulator.experiment")
    interrupts_raise()
    experiment.run(experiment.Options(config=config_path or outer_path, **options))


def _config_or_default(option: Path | None) -> Config:
    """Only a file that nobody asked for may be missing."""
    path = find_config(option)
    return single_node() if path == DEFAULT_PATH and option is None and not path.exists() else load_config(path)


def main() -> None:
    """Runs the command line and exits. What the user can mend is one line on stderr; a traceback is a fault of ours."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        code = cli.main(arguments, prog_name="disaggd", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except DisaggdError as error:
        return _complain(error)
    except BaseExceptionGroup as group:  # a role's TaskGroup wraps what ended it
        wanted, others = group.split(DisaggdError)
        if wanted is None or others is not None:
            raise
        return _complain(_first(wanted))
    return code if isinstance(code, int) else 0


def _complain(error: BaseException) -> int:
    assert isinstance(error, DisaggdError)
    click.echo(f"disaggd: {error}", err=True)
    return error.exit_code


def _first(group: BaseExceptionGroup[DisaggdError]) -> BaseException:
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    return inner
