"""`python -m fledge` is the `fledge` command."""

from fledge.cli import main

main()
