"""Muon for the filters of convolutions: momentum whose update is made orthogonal."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that lifts small singular values fastest


class FilterMuon(Optimizer):
    """Muon on parameters of two or more dimensions, each flattened to a matrix (out, everything else)."""

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        renormalize: bool,
        weight_decay: float,
    ):
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "renormalize": renormalize,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(parameters, defaults)
        flat = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim < 2]
        if flat:
            raise ValueError(f"it works on matrices and filters, and has been given parameters of shape {flat[0]}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # no closure, as everywhere here
        """Update the parameters; those of one shape together, for a GPU's sake."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for parameters in by_shape.values():
                directions = [self._direction(parameter, group) for parameter in parameters]
                matrices = torch.stack([direction.flatten(1) for direction in directions])
                updates = orthogonalize(matrices, group["ns_steps"])  # (n, out, rest)
                for parameter, update in zip(parameters, updates, strict=True):
                    if group["renormalize"]:
                        parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view(parameter.shape).to(parameter.dtype), alpha=-group["lr"])

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient with its momentum."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
        return parameter.grad.add(velocity, alpha=group["momentum"]) if group["nesterov"] else velocity


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Matrices (n, rows, columns) with their singular values moved towards 1: U S V^T to about U V^T.

    Newton and Schulz's iteration with Jordan's quintic, X <- a X + (b A + c A^2) X with A = X X^T; it ends between 0.7 and
    1.2 after five steps. In bf16 on a GPU, which bears it.
    """
    a, b, c = _COEFFICIENTS
    x = (
        matrices.bfloat16()
        if matrices.device.type == "cuda"
        else matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    )
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller product
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x
