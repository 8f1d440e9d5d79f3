"""`python -m shardmill.cli`: the command, from an interpreter without its script."""

from shardmill.cli.main import main

main()
