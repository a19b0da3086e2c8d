"""The command line, as the tests of the command line run it."""

import tests.cli.conftest

run = tests.cli.conftest.run
