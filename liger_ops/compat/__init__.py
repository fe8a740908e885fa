"""Running code that was written for Liger Kernel: ``import liger_kernel`` as another name for liger_ops."""

from liger_ops.compat.alias import install_liger_kernel_alias, uninstall_liger_kernel_alias

__all__ = ["install_liger_kernel_alias", "uninstall_liger_kernel_alias"]
