"""What the rows of a translation table share, and what tells them apart; importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lifelong_ens.errors import InputError


@dataclass(frozen=True)
class Setting:
    """Text, vocabulary and network; the options of ``lifelong-ens reproduce translation`` beside those of training.

    Attributes:
        root: Folder with train, valid and test text, one sentence a line and line by line each other's translation:
            ``train.en``, ``train.de`` and so on. Without it, phrases that num2words and Babel write.
        source: Language to translate from, as the files end.
        target: Language to translate to, as the files end.
        limit: Training pairs at most.
        vocabulary_size: Tokens of the vocabulary that both languages share.
        max_tokens: Training pairs with a longer side are left out, and no translation is longer.
        width: Of the network.
        heads: Of each attention.
        layers: Of the encoder, and of the decoder.
        dropout: Share of activations dropped in training.
        label_smoothing: Share of the probability that the loss wants spread over all tokens.
        evaluate_every: Steps from one look at the validation text to the next.
        target_perplexity: Count steps down to this validation perplexity; the best of the single network if not given.
    """

    root: Path | None = None
    source: str = "en"
    target: str = "de"
    limit: int | None = None
    vocabulary_size: int = 600
    max_tokens: int = 128
    width: int = 64
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1
    label_smoothing: float = 0.1
    evaluate_every: int = 50
    target_perplexity: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("vocabulary_size", 300), ("max_tokens", 2), ("evaluate_every", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is at least {least}, not {value}.")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is from 0 to below 1, not {self.label_smoothing}.")
        if self.target_perplexity is not None and not self.target_perplexity > 1:
            raise InputError(f"target_perplexity is above 1, not {self.target_perplexity}.")
        if self.source == self.target:
            raise InputError(f"source and target are both {self.source!r}; name two languages.")


@dataclass(frozen=True)
class Row:
    """One network of the table.

    Attributes:
        label: What the table calls it.
        num_members: One for the plain network.
        members_in: Which layers have members: self-attention, as in the paper, or ``all``.
        init: How fast weights start, as in ``batch_ensemble``.
        published_perplexity: On validation text, in the published setting.
        published_steps: Steps to the target in words, relative to the single network.
    """

    label: str
    num_members: int = 1
    members_in: Literal["self_attention", "all"] = "self_attention"
    init: Literal["random_sign", "gaussian", "ones"] = "random_sign"
    published_perplexity: float | None = None
    published_steps: str = "–"
