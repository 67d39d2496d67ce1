"""`python -m tests.fuzz --cases 20000`: what makes no sense, to everything that takes what others send. Other cases each time; see --help.

Exits with 0 if everything stood, else with 1 and the simplest case that something did not stand, per surface.
"""

import logging
import os
import sys
import time
import traceback
from math import ceil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import click

from tests.fuzz.surface import fuzz
from tests.fuzz.surfaces import SURFACES


@click.command()
@click.option("--cases", type=click.IntRange(1), default=20_000, show_default=True, help="Of all surfaces together, at least.")
@click.option("--seed", type=int, default=None, help="Which cases; by default others each time.")
@click.option("--only", default="", help="Surfaces whose name has this in it.")
def main(cases: int, seed: int | None, only: str) -> None:
    """Fuzz every surface with its share of the cases."""
    logging.disable(logging.CRITICAL)  # what is refused is logged, a hundred times a second
    seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    total, num_failed, begun = 0, 0, time.monotonic()
    for surface in SURFACES:
        if only not in surface.name:
            continue
        count, since, verdict = 0, time.monotonic(), "stood"
        try:
            count = fuzz(surface, ceil(cases * surface.share), seed)
        except Exception:  # noqa: BLE001  whatever it is, the other surfaces have their turn
            num_failed, verdict = num_failed + 1, "FAILED"
            traceback.print_exc()
        total += count
        print(f"{surface.name:45} {count:7} cases {time.monotonic() - since:7.1f} s  {verdict}", flush=True)
    print(f"{'all':45} {total:7} cases {time.monotonic() - begun:7.1f} s  --seed {seed}")
    sys.exit(1 if num_failed else 0)


main()
