"""``python -m liger_ops run``: an unmodified training script on these operators."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import runpy
import sys
from multiprocessing import spawn
from typing import Any

from liger_ops.compat import install_liger_kernel_alias

SUMMARY = "run a script with `import liger_kernel` and the Trainer's liger flag served by liger_ops"

DESCRIPTION = """\
Run a Python script, or a module with -m, as `python script.py` would, after two preparations:
`import liger_kernel` means liger_ops, and the Trainer's `use_liger_kernel=True` and `use_liger=True` patch
the model with liger_ops. Options of this command come before the script; all that follows belongs to it.

With a launcher:
  torchrun --nproc-per-node 8 -m liger_ops run script.py ...
  accelerate launch -m liger_ops run script.py ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.usage = (
        "python -m liger_ops run [-h] [--override] [--verbose] (script | -m module) [arguments ...]"
    )
    parser.add_argument(
        "--override",
        action="store_true",
        help="let `import liger_kernel` mean liger_ops even where the real liger-kernel is installed",
    )
    parser.add_argument("--verbose", action="store_true", help="print a line for each model that is patched")
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="a module to run, and its arguments"
    )
    parser.add_argument("script", nargs="?", help="a Python file, or a folder or archive with a __main__.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the script")
    parser.set_defaults(usage_error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Run the script in this process. SystemExit and exceptions pass through to the interpreter."""
    if options.verbose:
        logger = logging.getLogger("liger_ops")
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
    if options.module:
        module, *arguments = options.module
        sys.argv = [module, *arguments]
        _install(options.override)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif options.script:
        sys.argv = [options.script, *options.arguments]
        _set_script_folder(options.script)
        _install(options.override)
        runpy.run_path(options.script, run_name="__main__")
    else:
        options.usage_error("a script or -m module is required")
    return 0


def _set_script_folder(script: str) -> None:
    """Make the first entry of ``sys.path`` the script's folder, in place of the working directory's."""
    if getattr(sys.flags, "safe_path", False):
        return
    # `python -m` put the working directory there. For a folder or archive, runpy adds the script itself.
    del sys.path[0]
    if os.path.isfile(script):
        sys.path.insert(0, os.path.dirname(os.path.realpath(script)))


def _install(override: bool) -> None:
    try:
        install_liger_kernel_alias(override)
        _reach_spawned_processes()
    except ImportError as error:
        print(f"liger_ops run: {error}", file=sys.stderr)
    if importlib.util.find_spec("transformers") is not None:
        from liger_ops.transformers import install

        install()


class _AliasForChild:
    """Becomes a call of ``_prepare_child`` where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _prepare_child, ()


def _prepare_child() -> None:
    # The parent has decided whose name it is.
    install_liger_kernel_alias(override=True)
    _reach_spawned_processes()


def _reach_spawned_processes() -> None:
    """Install the alias in processes that multiprocessing starts anew (``spawn``, ``forkserver``) too.

    Such a process gets a dict from its parent, and imports the script as that says. Unpickling the dict comes
    before, and entries that multiprocessing does not know do no harm.
    """
    stock = spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**stock(name), "liger_ops": _AliasForChild()}

    if stock.__module__ != __name__:
        spawn.get_preparation_data = get_preparation_data
