"""The command line: ``python -m liger_ops info`` and ``python -m liger_ops doctor``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from liger_ops.cli import doctor, info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m liger_ops", description="Fused operators for training LLMs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (info, doctor):
        name = module.__name__.rsplit(".", 1)[-1]
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        command.add_argument("--json", action="store_true", help="print JSON in place of text")
        if module is doctor:
            doctor.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)
