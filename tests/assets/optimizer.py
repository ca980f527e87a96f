"""Muon for the matrices of the blocks, AdamW for everything else.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/): the momentum of a matrix is replaced by the
nearest orthogonal matrix, found with a Newton-Schulz iteration; the step is scaled to the size of AdamW's (Liu et
al., 2025, https://arxiv.org/abs/2502.16982).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix of each [N, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are one parameter group and go through the iteration together."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        shapes = sorted({tuple(m.shape) for m in matrices})
        groups = [{"params": [m for m in matrices if tuple(m.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            matrices: list[nn.Parameter] = group["params"]
            gradients = torch.stack([m.grad for m in matrices if m.grad is not None])
            state = self.state[matrices[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            state["momentum"].lerp_(gradients, 1 - group["momentum"])
            update = orthogonal(gradients.lerp(state["momentum"], group["momentum"]))
            size = 0.2 * max(update.shape[1:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-group["lr"] * size)


class Optimizers:
    """Both optimizers of a Flux and its table of words, with one schedule: `rate` 0..1 scales every learning rate."""

    def __init__(self, model: nn.Module, table: nn.Parameter, lr: float) -> None:
        in_blocks = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name and "mod" not in name}
        others = [p for name, p in model.named_parameters() if name not in in_blocks]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": others, "lr": lr}, {"params": [table], "lr": 2 * lr, "weight_decay": 0.0}],
                betas=(0.9, 0.98),
                weight_decay=0.01,
                fused=table.is_cuda,
            )
        ]
        self.parts.append(Muon(list(in_blocks.values()), lr))
        self.highest = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, rate: float) -> None:
        for part, rates in zip(self.parts, self.highest, strict=True):
            for group, highest in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * highest
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
