"""Muon for matrices and the filters of convolutions: momentum with orthogonalized updates."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that raises small singular values fastest
# Steps on X X^T before it is computed again: where an eigenvalue should be 0, rounding leaves about 1e-7, possibly negative,
# and each step multiplies that by 12, in the end without bound.
_STEPS_AT_ONCE = 3


class FilterMuon(Optimizer):
    """Muon on parameters of two or more dimensions, each flattened to a matrix (out, everything else).

    `product_dtype`: of the iteration's matrix products; not an option of a group, because it depends on the machine.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        renormalize: bool,
        weight_decay: float,
        product_dtype: torch.dtype = torch.float32,
    ):
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "renormalize": renormalize,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(parameters, defaults)
        self.product_dtype = product_dtype
        flat = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim < 2]
        if flat:
            raise ValueError(f"it works on matrices and filters, but got parameters of shape {flat[0]}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # the loop passes no closure
        """Update the parameters; parameters of one shape are stacked, which a GPU does faster."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for parameters in by_shape.values():
                matrices = torch.stack([direction.flatten(1) for direction in self._directions(parameters, group)])
                updates = orthogonalize(matrices, group["ns_steps"], self.product_dtype)  # (n, out, rest)
                if group["renormalize"]:
                    norms = torch._foreach_norm(parameters)
                    wanted = len(parameters[0]) ** 0.5
                    torch._foreach_mul_(parameters, [torch.where(norm > 0, wanted / norm, 1) for norm in norms])
                if group["weight_decay"]:
                    torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                shaped = [update.view_as(parameter) for parameter, update in zip(parameters, updates, strict=True)]
                torch._foreach_add_(parameters, shaped, alpha=-group["lr"])

    def _directions(self, parameters: list[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
        """Return the gradients with momentum. For half weights on a CPU, torch 2.15 rounds `momentum` to their format."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        velocities = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, gradients)
        return torch._foreach_add(gradients, velocities, alpha=group["momentum"]) if group["nesterov"] else velocities


def orthogonalize(matrices: Tensor, steps: int, product_dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthogonalize matrices (n, rows, columns): move their singular values towards 1, U S V^T to about U V^T.

    Uses the Newton-Schulz iteration with Jordan's quintic, X <- P X with P = a I + b A + c A^2 and A = X X^T; singular values
    are between 0.7 and 1.2 after five steps. `product_dtype` is bf16, which is accurate enough here, or float32 (float64 for
    float64 matrices).
    """
    x = matrices.to(
        product_dtype if product_dtype == torch.bfloat16 else torch.promote_types(matrices.dtype, product_dtype)
    )
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller product
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if 2 * x.shape[1] <= x.shape[2] and x.dtype != torch.bfloat16:
        for begun in range(0, steps, _STEPS_AT_ONCE):
            x = _iterate_gram(x, min(_STEPS_AT_ONCE, steps - begun))
    else:
        x = _iterate(x, steps)
    return (x.mT if tall else x).to(matrices.dtype)


def _iterate(x: Tensor, steps: int) -> Tensor:
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x


def _iterate_gram(x: Tensor, steps: int) -> Tensor:
    """The same iteration with small products (n, rows, rows) except for the first and the last: half the time for 256 x 2304.

    All P are polynomials of the first A and commute, so A <- P A P, and the result is the product of all P times X. In bf16,
    the small values of A would be lost.
    """
    gram = x @ x.mT
    product = factor = _factor(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    return product @ x


def _factor(gram: Tensor) -> Tensor:
    """Compute P from A."""
    a, b, c = _COEFFICIENTS
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor
