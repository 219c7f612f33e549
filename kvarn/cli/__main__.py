"""`python -m kvarn.cli` is the `kvarn` command."""

from kvarn.cli import main

main()
