"""Write a model of random weights, to measure with: see --help."""

import sys
from pathlib import Path

import click
from models import DEFAULT_ROOT, SHAPES, make_model

_LIST = "\n".join(f"{name}   {shape.about}: {shape.layers} layers, hidden {shape.hidden}" for name, shape in SHAPES.items())
_HELP = "Write models of random weights as Hugging Face directories in bfloat16, and print their paths.\n\n\b\n" + (
    _LIST + "\n\nOne that is there already is kept. The other benches write what they need themselves."
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=_HELP)
@click.argument("names", nargs=-1, metavar="SHAPE...", type=click.Choice(list(SHAPES)))
@click.option("--out", type=click.Path(path_type=Path), default=DEFAULT_ROOT, show_default=True, help="The directory that holds them all.")
@click.option("--quick", is_flag=True, help="The smallest shape only.")
def main(names: tuple[str, ...], out: Path, quick: bool) -> None:
    for name in names or (("S",) if quick else ("S", "M")):
        with click.progressbar(length=1000, label=name, file=sys.stderr) as bar:
            directory = make_model(name, out, lambda done, total, bar=bar: bar.update(done * 1000 // total - bar.pos))  # type: ignore[misc]
        click.echo(directory)


if __name__ == "__main__":
    main()
