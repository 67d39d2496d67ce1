"""What `make run` runs: `disaggd up`, of which Ctrl-C is the usual end, and no error that make should report."""

import sys

import disaggd.__main__  # noqa: F401  what it does about Ctrl-C while the rest is imported
from disaggd import cli
from disaggd.errors import EXIT_INTERRUPTED

sys.argv = ["disaggd", "up"]
try:
    cli.main()
except SystemExit as end:
    sys.exit(0 if end.code == EXIT_INTERRUPTED else end.code)
