"""What describes a set of Medusa heads and how their losses are weighed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCHEDULES = ("constant", "linear", "sine")
CONFIG_FILE = "medusa_config.json"


@dataclass(frozen=True)
class MedusaConfig:
    """Shape of the heads, and the weights of their losses.

    The loss is ``base_loss + ramp(step) · Σ_k heads_coefficient_k · decay^k · loss_k`` over the heads
    ``k = 1 … num_heads``; stage 1 leaves the base's loss out. The paper takes ``decay = 0.8``, and for stage
    2 a coefficient of 0.2 that a sine brings in.

    Attributes:
        num_heads: heads beside the base's own; head ``k`` predicts the token at ``t + 1 + k``.
        num_layers: residual blocks in each head; 0 leaves the vocabulary projection alone.
        heads_coefficient: one factor for all heads, or one for each.
        decay: factor between a head's weight and that of the head before it.
        schedule: the ramp by which the heads' losses come in over the optimizer steps ``s``: ``"constant"``
            at once, ``"linear"`` as ``s / schedule_steps``, ``"sine"`` as ``sin(π/2 · s / schedule_steps)``;
            1 from ``schedule_steps`` on.
        schedule_steps: length of that ramp. With a ramp and without a length, ``MedusaCallback`` takes the
            length of the whole training.

    Raises:
        TypeError, ValueError: for a value outside its range.
    """

    num_heads: int = 5
    num_layers: int = 1
    heads_coefficient: float | tuple[float, ...] = 1.0
    decay: float = 0.8
    schedule: str = "constant"
    schedule_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_heads", 1), ("num_layers", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if isinstance(self.heads_coefficient, Sequence) and not isinstance(self.heads_coefficient, str):
            object.__setattr__(self, "heads_coefficient", tuple(float(c) for c in self.heads_coefficient))
            if len(self.heads_coefficient) != self.num_heads:
                raise ValueError(
                    f"heads_coefficient must be one number or one for each of the {self.num_heads} heads, "
                    f"got {len(self.heads_coefficient)}"
                )
        elif not isinstance(self.heads_coefficient, (int, float)):
            kind = type(self.heads_coefficient).__name__
            raise TypeError(f"heads_coefficient must be a number or a sequence of them, got {kind}")
        if not all(math.isfinite(c) and c >= 0 for c in self.coefficients()):
            raise ValueError(
                f"heads_coefficient and decay must be finite and not negative, got {self.heads_coefficient} "
                f"and {self.decay}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.schedule_steps is not None and self.schedule_steps < 1:
            raise ValueError(f"schedule_steps must be positive or None, got {self.schedule_steps}")

    def coefficients(self) -> list[float]:
        """``heads_coefficient_k · decay^k`` for each head, before the ramp."""
        one = self.heads_coefficient
        each = one if isinstance(one, tuple) else (one,) * self.num_heads
        return [c * self.decay ** (k + 1) for k, c in enumerate(each)]

    def ramp(self, step: int, total_steps: int | None = None) -> float:
        """The schedule's factor, in [0, 1], at an optimizer step; the first is 0.

        Args:
            total_steps: length of the ramp where ``schedule_steps`` gives none.
        """
        if self.schedule == "constant":
            return 1.0
        length = self.schedule_steps or total_steps
        if not length:
            raise ValueError(
                f"a {self.schedule} schedule needs its length: set schedule_steps, or pass the number of "
                "training steps"
            )
        progress = min(1.0, step / length)
        return progress if self.schedule == "linear" else math.sin(math.pi / 2 * progress)

    def save(self, folder: Path, **base: object) -> None:
        """Write the file, with a description of the base that the heads belong to."""
        record = dataclasses.asdict(self) | {"base": base}
        (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> tuple[MedusaConfig, dict]:
        """The configuration in a folder, and what it says about the base."""
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it holds no Medusa heads")
        record = json.loads(path.read_text())
        base = record.pop("base", {})
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(record) - known):
            raise ValueError(
                f"{path}: unknown entries {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**record), base
