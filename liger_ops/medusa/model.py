"""A causal language model with Medusa heads, as transformers and its Trainer know models."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput

from liger_ops.functional import CrossEntropyOutput
from liger_ops.medusa.config import MedusaConfig
from liger_ops.medusa.generation import MedusaGeneration, generate
from liger_ops.medusa.heads import HeadTensors, MedusaHeads, autocast_dtype
from liger_ops.medusa.loss import medusa_loss
from liger_ops.transformers.families import family_of, supported_model_types
from liger_ops.transformers.forwards.causal_lm import balance_loss
from liger_ops.transformers.forwards.lm_head import LinearHead, linear_head, loss_in_call
from liger_ops.transformers.forwards.loss import (
    fused_causal_lm_loss,
    logits_loss,
    next_token_targets,
    single_number,
)
from liger_ops.transformers.parts import CausalLMHead
from liger_ops.transformers.patching import unwrap

HEADS = "heads."


@dataclass
class MedusaOutput(ModelOutput):
    """Result of ``MedusaModel``.

    Attributes:
        loss: 0-d float32, weighed over the heads.
        logits: (B, S, V) of the base's own head, or None where they were skipped.
        head_losses: (num_heads,) float32 without gradient, each head's own loss, not weighed.
        base_loss: (1,) float32 without gradient, the loss of the base's own head; None in stage 1.
        aux_loss: 0-d, the load-balancing loss of a mixture of experts, already part of ``loss``; else None.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    head_losses: torch.FloatTensor | None = None
    base_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None


class MedusaModel(PreTrainedModel):
    """A base and its Medusa heads.

    Stage 1 trains the heads alone: the base runs in evaluation mode, without a graph, and its own head's
    loss is left out. Stage 2 trains the heads and those parameters of the base that required gradients when
    it came here: all, or an adapter's.

    Args:
        base: a causal language model of a supported family, patched or not, as it is or in a ``PeftModel``.
        config: shape of the heads and weights of their losses; the default where None.
        stage: 1 or 2.
        dtype: of the heads; None takes the dtype of the base's head. ``torch.float32`` beside a base in 16
            bits is for training under autocast.

    Raises:
        TypeError, ValueError: for a base that can have no heads; the message names the supported types.
        NotImplementedError: for prompt learning, which would put tokens of its own before the labels'.
    """

    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True

    def __init__(
        self,
        base: nn.Module,
        config: MedusaConfig | None = None,
        *,
        stage: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        causal = _causal_model(base)
        super().__init__(causal.config)
        weight, bias = _projection(causal)
        config = config or MedusaConfig()
        self.base = base
        self.heads = MedusaHeads(config.num_heads, config.num_layers, weight, bias, dtype)
        self._no_split_modules = causal._no_split_modules
        self._trained_in_base = [name for name, p in base.named_parameters() if p.requires_grad]
        # Buffers, so that a new value needs neither a copy from the host nor a new compilation.
        for name, shape in (("coefficients", (config.num_heads,)), ("ramp", ())):
            self.register_buffer(
                name, torch.empty(shape, device=weight.device, dtype=torch.float32), persistent=False
            )
        self._set_config(config)
        self.set_stage(stage)

    # The configuration is the base's, which chose how its attention and its experts run.
    def _check_and_adjust_attn_implementation(self, implementation: Any, *args: Any, **kwargs: Any) -> Any:
        return implementation

    def _check_and_adjust_experts_implementation(self, implementation: Any, *args: Any, **kwargs: Any) -> Any:
        return implementation

    # ------------------------------------------------------------------------------------------- training

    def set_stage(self, stage: int, **weights: Any) -> MedusaModel:
        """Train the heads alone (1), or the base too (2); returns self.

        Args:
            weights: new values of those fields of ``MedusaConfig`` that weigh the losses.

        Raises:
            ValueError: for another number, for stage 2 of a base that came with nothing to train, and for a
                value outside its range.
            TypeError: for a field that would change the heads themselves, or that there is not.
        """
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 (heads alone) or 2 (heads and base), got {stage!r}")
        if stage == 2 and not self._trained_in_base:
            raise ValueError(
                "stage 2 trains the base, and no parameter of it required a gradient when it got its heads"
            )
        known = {field.name for field in dataclasses.fields(MedusaConfig)} - {"num_heads", "num_layers"}
        if unknown := sorted(weights.keys() - known):
            raise TypeError(
                f"set_stage cannot change {', '.join(unknown)}; the losses' weights are "
                f"{', '.join(sorted(known))}"
            )
        if weights:
            self._set_config(dataclasses.replace(self.medusa_config, **weights))
        self.stage = stage
        trained = set(self._trained_in_base) if stage == 2 else set()
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(name in trained)
        return self.train(self.training)

    def set_step(self, step: int, total_steps: int | None = None) -> None:
        """Set the schedule's factor to that of an optimizer step, as ``MedusaCallback`` does."""
        self._ramp = self.medusa_config.ramp(step, total_steps)
        self._needs_step = False
        self.ramp.fill_(self._ramp)

    def train(self, mode: bool = True) -> MedusaModel:
        super().train(mode)
        # Dropout in a frozen base would only blur what the heads learn from.
        self.base.train(mode and self.stage == 2)
        return self

    def _set_config(self, config: MedusaConfig) -> None:
        self.medusa_config = config
        self._ramp = config.ramp(0, 1)
        self._needs_step = config.schedule != "constant"
        self._fill_buffers()

    def _fill_buffers(self) -> None:
        for value, place in zip(self.medusa_config.coefficients(), self.coefficients, strict=True):
            place.fill_(value)
        self.ramp.fill_(self._ramp)

    def _apply(self, function: Callable, recurse: bool = True) -> MedusaModel:
        super()._apply(function, recurse)
        # What casts the model must not round the weights of its losses.
        self.coefficients, self.ramp = self.coefficients.float(), self.ramp.float()
        self._fill_buffers()
        return self

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the base's layers in backward. In stage 1 there are none to recompute."""
        self.causal_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.causal_model.gradient_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        self.causal_model.enable_input_require_grads()

    # -------------------------------------------------------------------------------------------- the base

    @property
    def causal_model(self) -> PreTrainedModel:
        """The base without PEFT's wrapper."""
        return unwrap(self.base)

    @property
    def head_part(self) -> CausalLMHead:
        """What the family's record says about the base's head."""
        return _head_part(self.causal_model)

    def get_input_embeddings(self) -> nn.Module:
        return self.causal_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.causal_model.get_output_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.causal_model.tie_weights(*args, **kwargs)

    @property
    def softcap(self) -> float | None:
        name = self.head_part.softcap
        return None if name is None else getattr(self.causal_model.config, name)

    def base_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits of the base's own head, as the stock forward returns them."""
        logits = self._capped(self.causal_model.lm_head(hidden_states))
        return logits.float() if self.head_part.float_logits else logits

    def head_logits(self, hidden_states: Tensor) -> list[Tensor]:
        """Logits of every Medusa head for the base's last hidden states."""
        if autocast_dtype(hidden_states) is None:
            hidden_states = hidden_states.to(self.heads[0][-1].weight.dtype)
        return [self._capped(logits) for logits in self.heads(hidden_states)]

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    # ------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        ignore_index: int = -100,
        accum_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MedusaOutput | tuple:
        """The loss of all heads.

        Args:
            labels: (B, S); head ``k`` at position ``t`` predicts ``labels[t + 1 + k]``.
            num_items_in_batch: divides each head's summed loss: a number or a tensor of one element on any
                device, or one per ``DataParallel`` replica. Without it each head's mean is taken.
            skip_logits: True leaves the base's logits out, False returns them; None skips them in training.
            return_dict: False returns a tuple of what is not None.
            ignore_index, accum_dtype: as in ``liger_ops.functional.fused_linear_cross_entropy``.
            kwargs: ``shift_labels`` (B, S), shifted for the base's head already, which win over ``labels``;
                the others are the backbone's, images for example.

        Raises:
            RuntimeError: in training with a ramp whose step was never set.
        """
        # Not in the signature: the Trainer would demand every argument with labels in its name of a batch.
        shift_labels = kwargs.pop("shift_labels", None)
        if self.training and self._needs_step and (labels is not None or shift_labels is not None):
            raise RuntimeError(
                f"the heads' losses come in by a {self.medusa_config.schedule} schedule: give the Trainer a "
                "MedusaCallback, or call set_step() before each optimizer step"
            )
        causal = self.causal_model
        router_loss = self.head_part.router_loss
        arguments = kwargs | dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        arguments.setdefault("use_cache", False)
        if router_loss is not None:
            balanced = self.stage == 2 and self.config.output_router_logits
            arguments.setdefault("output_router_logits", balanced)
        with torch.no_grad() if self.stage == 1 else contextlib.nullcontext():
            outputs = causal.model(**arguments, return_dict=True)
        hidden_states = outputs.last_hidden_state
        results: dict[str, Tensor | None] = {}
        if labels is not None or shift_labels is not None:
            targets = next_token_targets(labels, ignore_index) if shift_labels is None else shift_labels
            options = dict(ignore_index=ignore_index, num_items=single_number(num_items_in_batch))
            results = self._losses(hidden_states, targets, accum_dtype=accum_dtype, **options)
            if router_loss is not None and self.stage == 2:
                balance = getattr(sys.modules[family_of(causal.config.model_type).modeling], router_loss)
                aux_loss = balance_loss(causal, balance, arguments, outputs.router_logits)
                if aux_loss is not None:
                    aux_loss = aux_loss.to(results["loss"].device)
                    results["loss"] = results["loss"] + causal.router_aux_loss_coef * aux_loss
                results["aux_loss"] = aux_loss
        if skip_logits is None:
            skip_logits = self.training
        if not skip_logits:
            with torch.no_grad() if self.stage == 1 else contextlib.nullcontext():
                results["logits"] = self.base_logits(hidden_states)
        if return_dict is None:
            return_dict = self.config.return_dict
        # All at once: a result keeps its fields in the order in which they were set.
        result = MedusaOutput(**results)
        return result if return_dict else result.to_tuple()

    def _losses(self, hidden_states: Tensor, targets: Tensor, **options: Any) -> dict[str, Tensor | None]:
        heads = self.heads.tensors()
        shifts = list(range(1, len(heads) + 1))
        # Losses of an evaluation are to be compared with each other, wherever the ramp has got to.
        coefficients = self.coefficients * self.ramp if self.training else self.coefficients
        separate = None
        if self.stage == 2:
            own = linear_head(self.causal_model.lm_head)
            if own.obstacle is None and not own.sharded:
                heads.insert(0, HeadTensors((), own.weight, own.bias))
                shifts.insert(0, 0)
                coefficients = torch.cat([torch.ones_like(coefficients[:1]), coefficients])
            else:
                separate = self._base_loss(own, hidden_states, targets, **options)
        loss, losses = medusa_loss(
            hidden_states, heads, targets, coefficients, shifts=shifts, softcap=self.softcap, **options
        )
        if separate is not None:
            loss = loss + separate
            losses = torch.cat([separate.detach().reshape(1), losses])
        if self.stage == 1:
            return dict(loss=loss, head_losses=losses)
        return dict(loss=loss, head_losses=losses[1:], base_loss=losses[:1])

    def _base_loss(
        self,
        own: LinearHead,
        hidden_states: Tensor,
        targets: Tensor,
        ignore_index: int,
        num_items: Tensor | float | None,
        accum_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The loss of a base's head that has to be called, to have its shards gathered or an adapter run."""
        head = self.causal_model.lm_head
        options = dict(num_items_in_batch=num_items, ignore_index=ignore_index, softcap=self.softcap)
        if own.obstacle is not None:
            return logits_loss(head(hidden_states), targets, **options).loss

        def loss(x: Tensor, weight: Tensor, bias: Tensor | None) -> CrossEntropyOutput:
            return fused_causal_lm_loss(x, weight, bias, targets, accum_dtype=accum_dtype, **options)

        return loss_in_call(head, own.linear, hidden_states, loss).loss

    # ---------------------------------------------------------------------------------- saving and loading

    def save_heads(self, folder: str | Path) -> None:
        """Write the heads alone: ``model.safetensors`` and ``medusa_config.json``."""
        self._save(folder, self.state_dict(), base=False)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the heads and every parameter of the base that is being trained; the Trainer calls this.

        After stage 1 that is the heads alone. A base of stage 2 is written for others by its own
        ``model.base.save_pretrained``.

        Args:
            state_dict: of this model, gathered already; None takes the model's own.
            kwargs: of ``PreTrainedModel.save_pretrained``; without effect here.
        """
        if is_main_process:
            self._save(save_directory, self.state_dict() if state_dict is None else state_dict, base=True)

    def _save(self, folder: str | Path, state: dict[str, Tensor], base: bool) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = self._saved_names() if base else [n for n in self._saved_names() if n.startswith(HEADS)]
        tensors = {name: state[name].detach().contiguous() for name in names}
        save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        self.medusa_config.save(folder, **_description(self.causal_model))

    def _saved_names(self) -> list[str]:
        # Parameters by one name each: a file of this kind holds no tensor twice, and a base may tie its head.
        return [n for n, p in self.named_parameters() if n.startswith(HEADS) or p.requires_grad]

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """What the Trainer must not miss in a checkpoint that it resumes from."""
        return self.state_dict().keys() - set(self._saved_names())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: nn.Module, *, stage: int = 1, dtype: torch.dtype | None = None
    ) -> MedusaModel:
        """Put saved heads on a base, and into it what was saved of its parameters.

        Args:
            folder: written by ``save_heads``, ``save_pretrained`` or the Trainer.
            base: a model like the one they were trained on, with its adapter where there was one.
            stage, dtype: as in ``MedusaModel``.

        Raises:
            FileNotFoundError: when the folder holds no heads.
            ValueError: when they do not fit the base; it says in what.
        """
        folder = Path(folder)
        config, described = MedusaConfig.load(folder)
        file = folder / SAFE_WEIGHTS_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {SAFE_WEIGHTS_NAME}")
        actual = _description(_causal_model(base))
        misfits = [
            f"{name} {described[name]!r} instead of {actual[name]!r}"
            for name in ("model_type", "hidden_size", "vocab_size")
            if name in described and described[name] != actual[name]
        ]
        if misfits:
            raise ValueError(f"the heads in {folder} belong to a base with {', '.join(misfits)}")
        model = cls(base, config, stage=stage, dtype=dtype)
        state = load_file(file)
        own = model.state_dict()
        missing = sorted(name for name in own if name.startswith(HEADS) and name not in state)
        unknown = sorted(name for name in state if name not in own)
        shapes = sorted(name for name in state if name in own and state[name].shape != own[name].shape)
        for words, names in (
            ("lacks", missing),
            ("holds, but the model has not,", unknown),
            ("has other shapes of", shapes),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(f"{file} {words} {', '.join(names[:3])}{more}")
        model.load_state_dict(state, strict=False)
        return model

    # ------------------------------------------------------------------------------------------ generation

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> MedusaGeneration:
        """Greedy decoding, the heads' proposals verified by the base: the base's own greedy output, sooner.

        Args:
            input_ids: (1, S).
            attention_mask: (1, S) ones, as tokenizers give it, or None.
            max_new_tokens: at most so many tokens are added.
            eos_token_id: what ends the text; None takes the base's generation configuration.
            kwargs: the backbone's for the first forward, images for example.

        Raises:
            ValueError: for more than one sequence, none, or one with padding.
        """
        return generate(self, input_ids, attention_mask, max_new_tokens, eos_token_id, **kwargs)


def add_medusa_heads(
    base: nn.Module,
    config: MedusaConfig | None = None,
    *,
    stage: int = 1,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> MedusaModel:
    """A ``MedusaModel`` over the base; ``options`` are the fields of a ``MedusaConfig``, in its place."""
    if config is not None and options:
        raise TypeError(f"pass either a config or its fields, got both config and {', '.join(options)}")
    return MedusaModel(base, config or MedusaConfig(**options), stage=stage, dtype=dtype)


def _head_part(causal: nn.Module) -> CausalLMHead:
    model_type = causal.config.model_type
    parts = family_of(model_type).parts
    return next(p for p in parts if isinstance(p, CausalLMHead) and p.fits(causal, model_type))


def _causal_model(base: nn.Module) -> PreTrainedModel:
    """The causal language model in a base, or an error that says why it can have no heads."""
    if not isinstance(base, nn.Module):
        raise TypeError(f"base must be a torch.nn.Module, got {type(base).__name__}")
    for adapter in getattr(base, "peft_config", {}).values():
        if getattr(adapter, "is_prompt_learning", False):
            raise NotImplementedError(
                f"Medusa heads on a base with {adapter.peft_type.value}, which adds tokens of its own: "
                "use LoRA"
            )
    causal = unwrap(base)
    model_type = getattr(getattr(causal, "config", None), "model_type", None)
    if family_of(model_type) is None:
        raise ValueError(
            f"Medusa heads need a base of a known family, got {type(causal).__name__} (model type "
            f"{model_type!r}); known are {', '.join(supported_model_types())}"
        )
    if not isinstance(getattr(causal, "lm_head", None), nn.Module) or not hasattr(causal, "model"):
        raise ValueError(
            f"Medusa heads need a base with a language-model head, and {type(causal).__name__} has none"
        )
    return causal


def _projection(causal: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that the heads' projections start from: the base's own, without adapters."""
    head = causal.lm_head
    while hasattr(head, "base_layer"):
        head = head.base_layer
    own = linear_head(head)
    if own.obstacle is not None:
        raise ValueError(f"the heads start as copies of the base's lm_head, which {own.obstacle}")
    return own.weight, own.bias


def _description(causal: PreTrainedModel) -> dict[str, Any]:
    weight, _ = _projection(causal)
    return dict(
        model_type=causal.config.model_type,
        hidden_size=weight.shape[1],
        vocab_size=weight.shape[0],
        name_or_path=getattr(causal.config, "_name_or_path", ""),
    )
