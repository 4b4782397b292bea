"""What a schedule was found for: a transformer and a scheduler, as far as files and a few numbers can tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..family import Variant

SAMPLED = 16  # weights of the last linear, which no recipe quantizes
TOLERANCE = 0.01  # of the largest: bfloat16 rounds by 0.4%


@dataclass(frozen=True)
class Identity:
    """
    Attributes:
        transformer: its variant's fields by name.
        weights: some of its last linear; empty: they were not at hand.
        scheduler: diffusers' class.
        scheduler_config: its configuration.
    """

    transformer: dict[str, Any]
    weights: tuple[float, ...]
    scheduler: str
    scheduler_config: dict[str, Any]

    @classmethod
    def of(cls, transformer: Any, scheduler: Any) -> Identity:
        name, config = scheduler_identity(scheduler)
        return cls(asdict(Variant.of(transformer.config)), sampled_weights(transformer), name, config)

    def why_not_transformer(self, config: Mapping[str, Any], weights: tuple[float, ...]) -> str:
        """Why this is of another checkpoint than that with `config` and `weights`, in words; empty if it is not."""
        other = asdict(Variant.of(config))
        for name, value in self.transformer.items():
            if other.get(name) != value:
                return f"it is of a transformer with {name}={value!r}, this one has {other.get(name)!r}"
        if self.weights and weights:
            largest = max(map(abs, self.weights))
            if max(abs(a - b) for a, b in zip(self.weights, weights, strict=True)) > TOLERANCE * largest:
                return "it is of a checkpoint with other weights"
        return ""

    def why_not_scheduler(self, scheduler: Any) -> str:
        """Why this is of another scheduler, in words; empty if it is not."""
        name, config = scheduler_identity(scheduler)
        if name != self.scheduler:
            return f"it is of {self.scheduler}, the pipeline has {name}"
        for key, value in self.scheduler_config.items():
            if config.get(key) != value:
                return f"it is of a scheduler with {key}={value!r}, the pipeline's has {config.get(key)!r}"
        return ""


def scheduler_identity(scheduler: Any) -> tuple[str, dict[str, Any]]:
    """Class and configuration, without what says only where the latter came from."""
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return type(scheduler).__name__, {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}


def sampled_weights(transformer: Any) -> tuple[float, ...]:
    """Some weights of the transformer's last linear; empty where they are elsewhere, as offloading leaves them."""
    linear = getattr(transformer.proj_out, "base_layer", transformer.proj_out)
    weight = linear.weight.detach()
    if weight.device.type == "meta":
        return ()
    flat = weight.reshape(-1)
    chosen = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]
    return tuple(round(value, 6) for value in chosen.float().tolist())
