"""How long and with what a network is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lifelong_ens.errors import InputError
from lifelong_ens.training.augment import Augmentation


@dataclass(frozen=True)
class Fit:
    """The training of one task, the same for every method that is compared.

    Attributes:
        epochs: Passes over a task's images.
        batch_size: Images per step.
        optimizer: ``sgd`` (with momentum), ``adam`` or ``adamw``.
        learning_rate: At the start, before the schedule.
        momentum: Of SGD.
        weight_decay: L2 coefficient as torch counts it; never applied to fast weights.
        schedule: ``constant``, or ``cosine`` down to zero at the last step.
        warmup_epochs: Epochs of linear increase before the schedule starts.
        clip_norm: Largest norm of the whole gradient; none if not given.
        augment: ``none``, ``flip`` or ``crop_flip`` (moved by up to four pixels), new for each image and
            epoch.
        amp: Compute in bfloat16 where torch deems it safe.
        compile: Run the network through torch.compile.
        patience: Stop after so many epochs without a better validation accuracy and go back to the best
            epoch; needs a stream with a validation fraction.
        accumulate: A step's images pass through the network in so many parts, one after the other, for a part of
            the memory; batch norms see a part at a time.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: float = 0.0
    clip_norm: float | None = None
    augment: Augmentation = "none"
    amp: bool = False
    compile: bool = False
    patience: int | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("warmup_epochs", 0),
            ("weight_decay", 0),
            ("accumulate", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} is at least {least}, not {getattr(self, name)}.")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is above 0, not {value}.")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience is at least 1 epoch, not {self.patience}.")

    def as_dict(self) -> dict[str, Any]:
        """The options by name, as records state them; one that came later only where it is used.

        Runs are told apart by what this says: those made before an option was there are still the same runs.
        """
        options = asdict(self)
        if self.accumulate == 1:
            del options["accumulate"]
        return options

    def for_scales(self, learning_rate: float) -> Fit:
        """The same batches and precision for numbers that choose units: Adam at a constant rate and nothing more."""
        return replace(
            self,
            optimizer="adam",
            learning_rate=learning_rate,
            weight_decay=0.0,
            schedule="constant",
            warmup_epochs=0.0,
            clip_norm=None,
        )
