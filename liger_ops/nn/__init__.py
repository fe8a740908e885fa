"""Modules over the operators, with Liger's class names and signatures. Nothing here imports transformers."""

from liger_ops.nn.cross_entropy import LigerCrossEntropyLoss
from liger_ops.nn.experts import LigerExperts
from liger_ops.nn.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
from liger_ops.nn.geglu import LigerGEGLUMLP
from liger_ops.nn.rms_norm import LigerRMSNorm
from liger_ops.nn.swiglu import LigerBlockSparseTop2MLP, LigerPhi3SwiGLUMLP, LigerSwiGLUMLP

__all__ = [
    "LigerBlockSparseTop2MLP",
    "LigerCrossEntropyLoss",
    "LigerExperts",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerPhi3SwiGLUMLP",
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
]
