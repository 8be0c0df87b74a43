"""The SSD kernel in a model of your own: a small language model that learns to count.

    python examples/ssd_in_your_model.py

Two documents are packed into each row; `seq_idx` keeps them apart, and decoding carries the state along.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylepis.kernels.ssd import ssd, ssd_step

VOCAB, WIDTH, HEADS, STATE, PERIOD = 16, 64, 4, 16, 5


class TinyMamba(nn.Module):
    """Embedding, one SSD layer with a gate, output: x (b, l) → logits (b, l, VOCAB)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.project = nn.Linear(WIDTH, 2 * WIDTH + 2 * STATE + HEADS, bias=False)
        self.A_log = nn.Parameter(torch.zeros(HEADS))
        self.out = nn.Linear(WIDTH, VOCAB)

    def parts(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        z, x, B, C, dt = self.project(self.embed(tokens)).split((WIDTH, WIDTH, STATE, STATE, HEADS), dim=-1)
        return z, x.unflatten(-1, (HEADS, -1)), B.unsqueeze(-2), C.unsqueeze(-2), dt

    def forward(self, tokens: Tensor, seq_idx: Tensor) -> Tensor:
        z, x, B, C, dt = self.parts(tokens)
        y = ssd(x, dt, -self.A_log.exp(), B, C, dt_softplus=True, seq_idx=seq_idx)
        assert isinstance(y, Tensor)
        return self.out(y.flatten(-2) * F.silu(z))

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token per sequence, (b,) → logits (b, VOCAB), with the state carried along."""
        z, x, B, C, dt = self.parts(tokens)
        y, state = ssd_step(state, x, dt, -self.A_log.exp(), B, C, dt_softplus=True)
        return self.out(y.flatten(-2) * F.silu(z)), state


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of two packed documents, each counting up from a random token."""
    first = torch.randint(VOCAB, (16, 2, 1), generator=generator)
    ramp = torch.arange(20)[None, None]
    return ((first + ramp) % VOCAB).flatten(1), torch.arange(2).repeat_interleave(20).expand(16, 40)


def main() -> float:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = TinyMamba()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        tokens, seq_idx = batch(generator)
        logits = model(tokens, seq_idx)
        same = seq_idx[:, 1:] == seq_idx[:, :-1]  # no target across documents
        loss = F.cross_entropy(logits[:, :-1][same], tokens[:, 1:][same])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = torch.zeros(1, HEADS, WIDTH // HEADS, STATE)
    token, said = torch.tensor([3]), []
    with torch.no_grad():
        for _ in range(PERIOD):
            logits, state = model.step(token, state)
            token = logits.argmax(-1)
            said.append(int(token))
    print(f"loss {float(loss.detach()):.3f}; after 3 it says {said}")
    return float(loss.detach())


if __name__ == "__main__":
    main()
