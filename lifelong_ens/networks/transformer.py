"""A small Transformer that turns one sequence of tokens into another, and greedy decoding with or without members."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from lifelong_ens.convert import MemberNetwork
from lifelong_ens.errors import InputError


class EncoderDecoder(nn.Module):
    """Torch's encoder and decoder layers between one embedding table and one output projection; see the builder."""

    def __init__(
        self,
        embedding: nn.Embedding,
        encoder: nn.TransformerEncoder,
        decoder: nn.TransformerDecoder,
        output: nn.Linear,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding, self.encoder, self.decoder, self.output = embedding, encoder, decoder, output
        self.dropout = nn.Dropout(dropout)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """What follows each token of the target, given the source.

        Args:
            source: Token ids ``(batch, S)``, padded at the end.
            target: Token ids ``(batch, T)``; position t of the output has seen tokens 0 to t.

        Returns:
            Logits ``(batch, T, vocabulary)``.
        """
        return self.output(self.decode(self.encode(source), source, target))

    def encode(self, source: Tensor) -> Tensor:
        """``(batch, S)`` to what the decoder reads, ``(batch, S, width)``."""
        return self.encoder(self._embed(source), src_key_padding_mask=self._padding(source), is_causal=False)

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Features of each target position, ``(batch, T, width)``; ``memory`` is what ``encode`` made of ``source``."""
        causal = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], device=target.device, dtype=self.embedding.weight.dtype
        )
        # padding comes after all tokens, so that the causal mask hides it; rows of padding are read by nobody
        return self.decoder(
            self._embed(target),
            memory,
            tgt_mask=causal,
            tgt_is_causal=True,
            memory_key_padding_mask=self._padding(source),
        )

    def _padding(self, tokens: Tensor) -> Tensor:
        """Where nothing is to be read, ``(batch, length)``."""
        return tokens == self.embedding.padding_idx

    def _embed(self, tokens: Tensor) -> Tensor:
        width = self.embedding.embedding_dim
        embedded = self.embedding(tokens) * math.sqrt(width)
        return self.dropout(embedded + sinusoids(tokens.shape[1], width).to(embedded))


def encoder_decoder(
    vocabulary_size: int,
    width: int = 128,
    heads: int = 4,
    layers: int = 2,
    *,
    feedforward: int | None = None,
    dropout: float = 0.1,
    pad: int = 0,
    tied: bool = True,
) -> EncoderDecoder:
    """A Transformer (Vaswani et al. 2017) with one vocabulary for both sides.

    Norms come before each sublayer and once more at the end of both stacks, as is usual since; the paper's stand
    after. ``batch_ensemble`` with ``include=SELF_ATTENTION`` gives members to the self-attention of all layers.

    Args:
        vocabulary_size: How many tokens there are.
        width: Of the embeddings and of all layers; even.
        heads: Of every attention; ``width`` is a multiple.
        layers: Of the encoder, and as many of the decoder.
        feedforward: Hidden units of each layer; four times the width if not given.
        dropout: Share of activations dropped in training.
        pad: The token that fills up a batch's shorter rows.
        tied: Whether the output projection is the embedding table itself.
    """
    if width < 2 or width % 2 or heads < 1 or width % heads:
        raise InputError(f"width {width} with {heads} heads: expected an even multiple of the heads.")
    if layers < 1 or not 0 <= pad < vocabulary_size or not 0 <= dropout < 1:
        raise InputError(
            f"expected layers from 1, dropout from 0 to below 1 and a pad token inside the vocabulary, not layers "
            f"{layers}, dropout {dropout}, pad {pad}, vocabulary_size {vocabulary_size}."
        )
    options: Any = {
        "dim_feedforward": feedforward or 4 * width,
        "dropout": dropout,
        "batch_first": True,
        "norm_first": True,
    }
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(width, heads, **options),
        layers,
        nn.LayerNorm(width),
        enable_nested_tensor=False,
    )
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(width, heads, **options), layers, nn.LayerNorm(width)
    )
    # torch's stacks are copies of one layer: without this all layers would start alike
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    embedding, output = (
        nn.Embedding(vocabulary_size, width, padding_idx=pad),
        nn.Linear(width, vocabulary_size, bias=False),
    )
    nn.init.normal_(embedding.weight, std=width**-0.5)
    with torch.no_grad():
        embedding.weight[pad].zero_()
    if tied:
        output.weight = embedding.weight
    return EncoderDecoder(embedding, encoder, decoder, output, dropout)


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as sines and cosines of falling frequency (Vaswani et al. 2017, section 3.5), ``(length, width)``."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angles = torch.arange(length).unsqueeze(1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


@torch.no_grad()
def greedy_decode(
    model: EncoderDecoder | MemberNetwork, source: Tensor, *, start: int, end: int, max_length: int
) -> Tensor:
    """The likeliest next token, again and again; members' probabilities are averaged at every step.

    Dropout acts if the model is in training mode.

    Args:
        model: An ``EncoderDecoder``, or the ensemble that ``batch_ensemble`` made of one.
        source: Token ids ``(batch, S)``.
        start: The token that every target begins with.
        end: The token that ends a target.
        max_length: How many tokens are written at most.

    Returns:
        Token ids ``(batch, length)`` without the start; after its end token a row holds the pad token.
    """
    ensemble = isinstance(model, MemberNetwork)
    body = cast("EncoderDecoder", model.body if ensemble else model)
    num_members, pad = model.num_members if ensemble else 1, cast("int", body.embedding.padding_idx)
    target = source.new_full((len(source), 1), start)
    running = torch.ones(len(source), dtype=torch.bool, device=source.device)
    source = source.repeat(num_members, 1)
    with model.selection.of(None) if ensemble else nullcontext():
        memory = body.encode(source)
        for _ in range(max_length):
            features = body.decode(memory, source, target.repeat(num_members, 1))[:, -1]
            likely = body.output(features).softmax(-1).unflatten(0, (num_members, -1)).mean(0).argmax(-1)
            target = torch.cat([target, torch.where(running, likely, pad).unsqueeze(1)], dim=1)
            running &= likely != end
            if not running.any():
                break
    return target[:, 1:]
