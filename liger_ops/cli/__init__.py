"""The command line: ``python -m liger_ops info``, ``doctor`` and ``run``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from liger_ops.cli import doctor, info, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m liger_ops", description="Fused operators for training LLMs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (info, doctor, run):
        name = module.__name__.rsplit(".", 1)[-1]
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)
