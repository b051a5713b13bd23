"""Evaluation against counts by hand, and the operations that it runs on the device."""

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from shardstep.configs.schema import EvalConfig
from shardstep.trainer.evaluation import Evaluation, evaluate
from shardstep.trainer.optim.losses import build_objective

# A host waits for its GPU in each of these: bincount asks for the largest number, lift_fresh begins a tensor made of one.
WAITING = {
    "aten.bincount.default",
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.lift_fresh.default",
}


class Recorder(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names[str(function)] += 1
        return function(*args, **kwargs or {})


def evaluate_recorded() -> tuple[Evaluation | None, Tensor, Tensor, Counter[str]]:
    """An evaluation of 11 logits over 6 classes in batches of 4, 4 and 3; the logits, the labels, the operations."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(11, 6, generator=generator), torch.randint(0, 6, (11,), generator=generator)
    recorder = Recorder()

    def batches() -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        parts = list(zip(logits.split(4), labels.split(4), strict=True))
        with recorder:
            for images, wanted in parts:
                yield images, wanted, np.zeros(0)

    objective = build_objective({"name": "cross_entropy", "reduction": "mean"}, {})
    alone: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    found = evaluate(alone, torch.nn.Identity(), batches, objective, 11, 6, EvalConfig())
    return found, logits, labels, recorder.names


def test_figures_are_those_counted_by_hand() -> None:
    found, logits, labels, _ = evaluate_recorded()
    assert found is not None
    order = logits.argsort(dim=1, descending=True)
    assert found.samples == 11
    assert found.accuracy == (order[:, 0] == labels).sum().item() / 11
    assert found.top5 == (order[:, :5] == labels.unsqueeze(1)).sum().item() / 11
    torch.testing.assert_close(found.loss, functional.cross_entropy(logits.double(), labels).item(), rtol=1e-6, atol=0)
    assert found.confusion is not None
    expected = torch.zeros(6, 6, dtype=torch.long)
    for label, best in zip(labels.tolist(), order[:, 0].tolist(), strict=True):
        expected[label, best] += 1
    assert torch.equal(found.confusion, expected)
    assert found.class_samples is not None
    assert found.class_samples.tolist() == expected.sum(dim=1).tolist()


def test_very_many_classes_are_counted_without_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    small, *_ = evaluate_recorded()
    monkeypatch.setattr("shardstep.trainer.evaluation.MOST_CLASSES_IN_CONFUSION", 5)
    large, _, _, names = evaluate_recorded()
    assert small is not None
    assert large is not None
    assert large.confusion is None
    assert large.per_class_accuracy == small.per_class_accuracy
    assert (large.accuracy, large.top5, large.loss) == (small.accuracy, small.top5, small.loss)
    assert not names.keys() & WAITING


def test_no_batch_makes_the_host_wait() -> None:
    _, _, _, names = evaluate_recorded()
    assert "aten.topk.default" in names  # they are recorded
    assert not names.keys() & WAITING
