"""Cross-entropy of logits divided by a temperature."""

from torch import Tensor
from torch.nn import functional


def tempered(outputs: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    return functional.cross_entropy(outputs.float() / temperature, labels, reduction="none")  # (B,)
