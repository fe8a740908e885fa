"""Writes docs/models.md from the table of model families.

    python docs/generate_models.py

`tests/models/test_docs.py` fails when the page is not what this prints.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from liger_ops.transformers.families import FAMILIES, Family
from liger_ops.transformers.forwards.blocks import PatchableLayerNorm
from liger_ops.transformers.parts import CausalLMHead, Experts, LayerNorm, Part, RMSNorm, TokenLoss

PAGE = Path(__file__).resolve().parent / "models.md"

INTRODUCTION = """\
# Models

What `liger_ops.transformers.patch(model)` replaces, family by family, and what it leaves. Written by
`python docs/generate_models.py` from `liger_ops/transformers/families.py`.

Each part has an option of `patch`; all but `cross_entropy` are on. `apply_liger_kernel_to_<family>` takes the
same options in Liger's order. Before or after construction (without a model: for all models of the family),
before or after PEFT wraps the model; `report.undo()` restores the very functions that were there.

The module decides, not the configuration: an MLP with SiLU runs SwiGLU, one with GELU runs GeGLU, exact or by
tanh as its activation is; biases, epsilons and adapters are the module's own. What a module does that no
operator computes keeps the stock code, and the report says which and why.

## In every family

| stays | why |
|---|---|
| attention | transformers dispatches it to SDPA or FlashAttention, which are fused already |
| the addition of the residual and the norm after it | `add_rms_norm` exists, but both happen in the decoder \
layer's own forward: replacing that switches gradient checkpointing off in newer versions of transformers, \
which wrap it when the class is made, and would tie us to every version's layer. In your own model, call it |
| cos and sin | computed once per forward for all layers, and small |
| decoder layers, routers | transformers records their outputs by class |
| a head that is more than a linear map (LoRA on it, hooks, an offloaded or quantised weight) | the fused \
loss reads its weight and would leave the rest out: it is called, and `liger::cross_entropy` gets the logits |
| a `loss_function` of the user's | it is called, with logits |

Beside these, `lean_activations` (off) lets a model's layers keep less for backward: [memory.md](memory.md).

The rotary functions are globals of the modeling module: until `undo()`, other models of the family run the
operator too. It rounds once where the stock code rounds three times; otherwise the numbers are the same.
"""

RECOGNITION = """\
## Other models

`patch(model)` of a type without a record looks for norms (`rms_norm`, `layer_norm`), gated MLPs (`swiglu`,
`geglu`, one projection or two) and rotary functions by their structure, in transformers' code and in a
model's own. Each candidate runs beside its replacement on small random tensors, on the model's device, norms
and rotary functions in float32 and bfloat16 too, and is taken when results and gradients agree. Parameters,
gradients and random state stay as they were. The report lists what only looked alike, with the difference.

The head keeps its logits, since nobody has read it. When its loss is transformers' next-token loss, that
becomes `liger::cross_entropy`, which makes no float32 copy of the logits.

`patch(model, recognize=False)` leaves such a model alone with a warning, and so does the Trainer's flag
unless `liger_kernel_config={"recognize": True}` asks for it.
"""


def what(part: Part) -> str:
    if isinstance(part, RMSNorm):
        rounding = "rounds before the weight" if part.casting_mode == "llama" else "rounds once"
        return f"{rounding}, weight {f'+ {part.offset:g}' if part.offset else 'as it is'}"
    if isinstance(part, LayerNorm):
        return "of the vision tower, each with its own epsilon"
    if isinstance(part, Experts):
        return "all experts of a layer, unless the configuration asks for an implementation by name"
    if isinstance(part, TokenLoss):
        return "loss from logits, in place of the fused one"
    if isinstance(part, CausalLMHead):
        extra = [
            part.softcap and "soft-capped logits",
            part.router_loss and "the router's loss too",
            part.float_logits and "logits in float32",
        ]
        return ", ".join(["loss straight from the hidden states", *filter(None, extra)])
    return ""


def operators(part: Part) -> str:
    if part.option not in ("swiglu", "geglu") or isinstance(part, Experts):
        return f"`{part.operator}`"
    suffix = "_packed" if part.operator.endswith("_packed") else ""
    return f"`liger::swiglu{suffix}` or `liger::geglu{suffix}`"


def section(family: Family) -> str:
    modeling = importlib.import_module(family.modeling)
    types = ", ".join(f"`{model_type}`" for model_type in family.model_types)
    lines = [
        f"## {family.title}",
        "",
        f"Model type {types}; `apply_liger_kernel_to_{family.name}`.",
        "",
        "| option | replaced | runs | |",
        "|---|---|---|---|",
    ]
    for part in family.parts:
        only = f" (`{part.model_types[0]}`)" if len(family.model_types) > 1 and part.model_types else ""
        lines.append(f"| `{part.option}` | `{part.target}`{only} | {operators(part)} | {what(part)} |")
    left = list(family.left)
    layer_norm = any(isinstance(part, LayerNorm) for part in family.parts)
    if layer_norm:
        local = vars(modeling).get("LayerNorm") is PatchableLayerNorm.__base__
        reason = "models built before are not reached" if local else "the class is torch's, and every model's"
        left.append(("`LayerNorm` when no model is given", reason))
    if left:
        lines += ["", "| stays | why |", "|---|---|", *(f"| {name} | {why} |" for name, why in left)]
    return "\n".join([*lines, ""])


def page() -> str:
    return "\n".join([INTRODUCTION, *map(section, FAMILIES), RECOGNITION])


if __name__ == "__main__":
    PAGE.write_text(page())
