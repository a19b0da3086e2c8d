"""``python -m smolstack``: the same as the ``smolstack`` command."""

from smolstack.cli.app import main

main()
