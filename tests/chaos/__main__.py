"""`python -m tests.chaos --seed N --faults 500 --requests 5000`: breaks a cluster, and says what became of it. See --help.

`--soak MINUTES` breaks nothing, and looks whether anything grows. Both exit with 0 if nothing was found that must not be, else with 1: the
findings name the seed and the fault after which to look.
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the oracle leaves the processors to the cluster

import click
import msgspec
import torch

from tests.chaos.campaign import TEMPOS, Plan, carry_out
from tests.chaos.report import Report, markdown
from tests.chaos.soak import SoakReport, soak
from tests.chaos.soak import markdown as soak_markdown
from tests.support.oracle import Oracle


@click.command()
@click.option("--seed", type=int, default=None, help="Which faults and which requests; by default others each time.")
@click.option("--faults", type=click.IntRange(0), default=500, show_default=True)
@click.option("--requests", type=click.IntRange(0), default=5000, show_default=True, help="At least so many.")
@click.option("--tempo", type=click.Choice(sorted(TEMPOS)), default="quick", show_default=True, help="quick: timeouts scaled down.")
@click.option("--rate", type=float, default=3.0, show_default=True, help="Requests per second.")
@click.option("--cases", type=int, default=220, show_default=True, help="Different questions.")
@click.option("--rest-every", type=int, default=24, show_default=True, help="Faults between two rests, at which all is checked.")
@click.option("--minutes", type=float, default=None, help="Begin no fault later than this.")
@click.option("--soak", "soak_minutes", type=float, default=None, help="No faults, but so many minutes of load.")
@click.option("--load", type=float, default=0.8, show_default=True, help="Of a soak: the share of what the cluster can take.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), default=None, help="Where the whole report goes.")
@click.option("--logs", type=click.Path(path_type=Path, file_okay=False), default=None, help="Keep the nodes' logs there.")
def main(
    seed: int | None, soak_minutes: float | None, load: float, cases: int, json_path: Path | None, logs: Path | None, **how: object
) -> None:
    """Break a 2P2D cluster under load in every way there is, and check that nothing is lost."""
    torch.set_num_threads(1)
    begun = time.monotonic()
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    print(f"starting 2P2D + router, seed {seed} …", flush=True)
    with contextlib.ExitStack() as stack:
        directory = logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        report: Report | SoakReport
        if soak_minutes is None:
            plan = msgspec.convert({"seed": seed, "cases": cases, **how}, Plan)
            report = carry_out(plan, directory, Oracle(), lambda line: print(f"{time.monotonic() - begun:7.1f}  {line}", flush=True))
        else:
            report = soak(directory, Oracle(), seed, soak_minutes, load, cases)
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    print("\n" + (soak_markdown(report) if isinstance(report, SoakReport) else markdown(report)))
    if report.findings:
        print(f"\n{len(report.findings)} findings; again with --seed {seed}:")
        for finding in report.findings:
            print(f"  {finding}")
        sys.exit(1)


if __name__ == "__main__":
    main()
