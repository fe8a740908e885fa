"""The command line: ``python -m liger_ops info``, ``doctor``, ``bench`` and ``run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from liger_ops.cli import bench, doctor, info, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m liger_ops", description="Fused operators for training LLMs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    arguments = sys.argv[1:] if arguments is None else arguments
    for module in (info, doctor, bench, run):
        name = module.__name__.rsplit(".", 1)[-1]
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        # Only the command in question: bench loads the benchmark to know its options.
        if name in arguments[:1]:
            module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)
