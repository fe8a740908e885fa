"""The experts of transformers' mixture models: a function for its interface of experts implementations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers.integrations import moe

from liger_ops.nn.experts import mixture_of_experts
from liger_ops.transformers.forwards.blocks import gate_of

NAME = "liger_ops"


def register_experts() -> str:
    """Make ``experts_forward`` selectable as the experts implementation ``"liger_ops"``, and return the name.

    Select it with ``model.set_experts_implementation("liger_ops")``, or with
    ``experts_implementation="liger_ops"`` in ``from_pretrained`` or ``from_config``. Registering again
    changes nothing.
    """
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    return NAME


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What ``module``, an experts module of transformers such as ``MixtralExperts``, computes.

    Grouped matrix products, with SiLU and GELU gates fused. A gate of the class's own (clamped, interleaved)
    or another activation runs as it is. Biases, transposed weights, experts without a gate, a norm after the
    experts, and the sentinel index of expert parallelism are honoured.

    Args:
        module: reads ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, ``act_fn``, and what
            transformers' ``use_experts_implementation`` sets.
        hidden_states: (N, H).
        top_k_index: (N, K).
        top_k_weights: (N, K).

    Returns:
        (N, H) of hidden_states' dtype, without host synchronisation where
        ``liger_ops.nn.experts.mixture_of_experts`` needs none.
    """
    gated = getattr(module, "has_gate", True)
    projection = "gate_up_proj" if gated else "up_proj"
    biased = getattr(module, "has_bias", False)
    fused = _fused_gate_of(module) if gated else None
    normalise = _norm(module)
    return mixture_of_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        getattr(module, projection),
        module.down_proj,
        fused or (_own_gate(module) if gated else module.act_fn),
        gate_up_bias=getattr(module, f"{projection}_bias") if biased else None,
        down_bias=module.down_proj_bias if biased else None,
        transposed=getattr(module, "is_transposed", False),
        normalise=normalise,
        clear_unused=fused is None or normalise is not None,
    )


# What transformers gives to classes without a gate of their own: act_fn(gate) * up of the two halves.
_DEFAULT_GATE = getattr(moe, "_default_apply_gate", None)


def _has_own_gate(module: nn.Module) -> bool:
    return "_apply_gate" in vars(module) or getattr(type(module), "_apply_gate", None) not in (
        None,
        _DEFAULT_GATE,
    )


def _fused_gate_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if _has_own_gate(module):
        return None
    gate = gate_of(module.act_fn)
    return None if gate is None else gate.packed


def _own_gate(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if hasattr(module, "_apply_gate"):
        return module._apply_gate

    def gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    return gate


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if not getattr(module, "has_post_expert_norm", False):
        return None
    return getattr(module, "_apply_post_norm", None) or module.post_expert_norm
