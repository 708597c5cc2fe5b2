"""A recurrent policy that says how many units each layer gains (Xu and Zhu, NeurIPS 2018, arXiv 1805.12369)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Controller(nn.Module):
    """An LSTM that draws a number of units for one group of channels after the other and learns from rewards.

    One step of two LSTM layers for every group; a shared linear layer and a softmax over 0, 1, ... units. The first
    input is a random vector that stays, each later one the number just drawn, as one-hot, so that the policy is
    ``prod_i pi(k_i | k_1 .. k_{i-1})``. It follows the policy gradient of actor and critic,
    ``(R - V) grad log pi(k_1 .. k_m)``, by Adam.

    Source: the equations of the paper, read in the authors' code (github.com/xujinfan/Reinforced-Continual-Learning,
    commit d099af9). ``released`` takes over two choices of that code which keep it from learning within its 50 trials:

    * It feeds the softmax vector on instead of the number drawn, so that the draws are independent of each other.
    * Its critic V is a linear layer on the constant first input, moved by Adam at 0.005 a trial, whose steps of up
      to 0.08 are larger than what units cost (0.003 for 29 of them). Otherwise V is the mean of the rewards so far,
      which is the constant with the least squared error and has no step; an early version of their code offers it too.

    Where accuracy is 0.95 whatever is added and a unit costs 1e-4, and there are two groups of up to 29 units, the
    share of units drawn falls from 0.50 to 0.34 in 20 trials and to 0.12 in 50 (means of 6 seeds, learning rate 0.01).
    At 0.001, the code's, it is 0.49 after 50 trials; with ``released`` it is still 0.50.

    Args:
        limits: Most units of each group.
        learning_rate: Of the policy.
        hidden: Width of the LSTM's layers.
        released: Do as the released code does.
    """

    start: Tensor

    def __init__(
        self, limits: Sequence[int], *, learning_rate: float, hidden: int = 100, released: bool = False
    ) -> None:
        super().__init__()
        choices = max(limits) + 1
        self.limits, self.released = list(limits), released
        self.cells = nn.ModuleList([nn.LSTMCell(choices, hidden), nn.LSTMCell(hidden, hidden)])
        self.output = nn.Linear(hidden, choices)
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("start", torch.rand(choices))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        self.critic = LinearCritic(self.start) if released else MeanCritic()

    def sample(self) -> list[int]:
        """Draw a number of units for every group from torch's generator."""
        units: list[int] = []
        with torch.no_grad():
            for log_probs in self._steps(units):
                units.append(int(torch.multinomial(log_probs.exp(), 1)))
        return units

    def log_prob(self, units: Sequence[int]) -> Tensor:
        """Log-probability of drawing these units."""
        steps = zip(self._steps(units), units, strict=True)
        return torch.stack([log_probs[count] for log_probs, count in steps]).sum()

    def learn(self, units: Sequence[int], reward: float) -> None:
        """Make units that were drawn more likely the better their reward is than expected."""
        advantage = reward - self.critic.learn(reward)
        self.optimizer.zero_grad()
        (-advantage * self.log_prob(units)).backward()
        self.optimizer.step()

    def _steps(self, units: Sequence[int]) -> Iterator[Tensor]:
        """Log-probabilities ``(choices,)`` of each group; ``units`` holds those of a group before the next is asked."""
        x = self.start.unsqueeze(0)
        states: list[tuple[Tensor, Tensor] | None] = [None] * len(self.cells)
        choices = torch.arange(len(self.start))
        for group, limit in enumerate(self.limits):
            for index, cell in enumerate(self.cells):
                states[index] = cell(x, states[index])
                x = states[index][0]  # pyright: ignore[reportOptionalSubscript]
            logits = self.output(x).masked_fill(choices > limit, -torch.inf)
            log_probs = torch.log_softmax(logits, dim=1)
            yield log_probs.squeeze(0)
            x = log_probs.exp()
            if not self.released:
                x = F.one_hot(choices[units[group]], len(choices)).to(x).unsqueeze(0)


class MeanCritic:
    """Expects the mean of the rewards so far, and of the first one what it is."""

    def __init__(self) -> None:
        self.mean, self.count = 0.0, 0

    def learn(self, reward: float) -> float:
        """What was expected before this reward."""
        expected = self.mean if self.count else reward
        self.count += 1
        self.mean += (reward - self.mean) / self.count
        return expected


class LinearCritic:
    """A linear layer from zero on a state that does not change, fitted by Adam.

    Args:
        state: ``(choices,)``.
    """

    def __init__(self, state: Tensor) -> None:
        self.state = state
        self.value = nn.Linear(len(state), 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        self.optimizer = torch.optim.Adam(self.value.parameters(), lr=0.005)

    def learn(self, reward: float) -> float:
        """What was expected before this reward."""
        expected = self.value(self.state).squeeze()
        self.optimizer.zero_grad()
        (expected - reward).square().backward()
        self.optimizer.step()
        return expected.item()
