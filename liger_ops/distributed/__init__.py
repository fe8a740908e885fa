"""Beyond one process: losses over a vocabulary spread over processes, sharding rules for DTensor."""

from liger_ops.distributed.vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_fused_linear_cross_entropy,
)

__all__ = ["vocab_parallel_cross_entropy", "vocab_parallel_fused_linear_cross_entropy"]
