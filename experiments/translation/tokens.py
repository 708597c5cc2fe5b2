"""A vocabulary shared by both languages, and batches of sentences of like length."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.translation.text import Pairs
from lifelong_ens.errors import InputError

PAD, START, END = 0, 1, 2
SPECIAL = ["<pad>", "<s>", "</s>"]
# batches that are cut from one sorted stretch of the shuffled pairs
POOL = 50

Batch = tuple[Tensor, Tensor]
Ids = list[int]


class Vocabulary:
    """Byte-pair encoding (Sennrich et al. 2016) on bytes, by Hugging Face's ``tokenizers``; no text is unknown to it.

    Args:
        texts: What it is learnt from: training text alone. The same text gives the same vocabulary.
        size: Tokens at most, the 256 bytes and three special ones included.
    """

    def __init__(self, texts: Iterable[str], size: int) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self.tokenizer: Any = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        self.tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
            vocab_size=size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self.tokenizer.train_from_iterator(map(_normal, texts), trainer)
        # "</s>" inside a sentence is text
        self.tokenizer.encode_special_tokens = True

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def sha256(self) -> str:
        """Of its tokens and merges."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def encode(self, texts: Iterable[str]) -> list[Ids]:
        """Token ids of each text, with the end token."""
        return [[*one.ids, END] for one in self.tokenizer.encode_batch(list(map(_normal, texts)))]

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """The text up to the end token."""
        cut = [row[: row.index(END)] if END in row else row for row in map(list, rows)]
        return [text.strip() for text in self.tokenizer.decode_batch(cut, skip_special_tokens=True)]


def _normal(text: str) -> str:
    """The same letters as the same bytes, whether or not their accents were written apart."""
    return unicodedata.normalize("NFC", text)


class Sentences:
    """Pairs as token ids."""

    def __init__(self, source: Sequence[Ids], target: Sequence[Ids]) -> None:
        self.source, self.target = source, target

    @classmethod
    def of(cls, pairs: Pairs, vocabulary: Vocabulary) -> Sentences:
        """All pairs in their order."""
        return cls(vocabulary.encode(pairs.source), vocabulary.encode(pairs.target))

    def __len__(self) -> int:
        return len(self.source)

    def up_to(self, max_tokens: int) -> Sentences:
        """Those with no side longer than that, the end token included.

        Raises:
            InputError: None is left.
        """
        kept = [
            (source, target)
            for source, target in zip(self.source, self.target, strict=True)
            if max(len(source), len(target)) <= max_tokens
        ]
        if not kept:
            raise InputError(f"every training pair has more than max_tokens {max_tokens} tokens; raise it.")
        return Sentences(*map(list, zip(*kept, strict=True)))

    def batch(self, rows: Sequence[int]) -> Batch:
        """Source ``(batch, S)`` and target ``(batch, T)``, which begins with the start token; both padded."""
        return _padded([self.source[row] for row in rows]), _padded(
            [[START, *self.target[row]] for row in rows]
        )

    def by_length(self, batch_size: int) -> Iterator[list[int]]:
        """Rows from short to long, a batch at a time."""
        order = sorted(range(len(self)), key=self._length)
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def epochs(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches of like length in random order, epoch after epoch without end."""
        while True:
            order = torch.randperm(len(self), generator=generator).tolist()
            for first in range(0, len(order), POOL * batch_size):
                pool = sorted(order[first : first + POOL * batch_size], key=self._length)
                batches = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
                for place in torch.randperm(len(batches), generator=generator).tolist():
                    yield self.batch(batches[place])

    def _length(self, row: int) -> tuple[int, int]:
        return len(self.target[row]), len(self.source[row])


def _padded(rows: Sequence[Ids]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])
