"""Importing this module does what ``python -m liger_ops run`` does before it runs a script.

For frameworks that start their workers themselves and import a module that the user names. From then on
``import liger_kernel`` means liger_ops, even where the real liger-kernel is installed, and the Trainer's
``use_liger_kernel=True`` patches with liger_ops.
"""

from __future__ import annotations

import importlib.util

from liger_ops.compat.alias import install_liger_kernel_alias

install_liger_kernel_alias(override=True)
if importlib.util.find_spec("transformers") is not None:
    from liger_ops.transformers import install

    install()
