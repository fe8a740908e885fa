"""Modules over the operators, with Liger's class names and signatures. Nothing here imports transformers."""

from liger_ops.nn._lean import lean_activations, lean_contexts
from liger_ops.nn.add_rms_norm import LigerFusedAddRMSNorm
from liger_ops.nn.cross_entropy import LigerCrossEntropyLoss
from liger_ops.nn.experts import LigerExperts
from liger_ops.nn.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
from liger_ops.nn.geglu import LigerGEGLUMLP
from liger_ops.nn.layer_norm import LigerLayerNorm
from liger_ops.nn.rms_norm import LigerRMSNorm, LigerRMSNormForGemma, LigerRMSNormForGemma2
from liger_ops.nn.swiglu import LigerBlockSparseTop2MLP, LigerPhi3SwiGLUMLP, LigerSwiGLUMLP

__all__ = [
    "LigerBlockSparseTop2MLP",
    "LigerCrossEntropyLoss",
    "LigerExperts",
    "LigerFusedAddRMSNorm",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerLayerNorm",
    "LigerPhi3SwiGLUMLP",
    "LigerRMSNorm",
    "LigerRMSNormForGemma",
    "LigerRMSNormForGemma2",
    "LigerSwiGLUMLP",
    "lean_activations",
    "lean_contexts",
]
