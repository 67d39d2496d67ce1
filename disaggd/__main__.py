"""`python -m disaggd`."""

from disaggd.cli import main

main()
