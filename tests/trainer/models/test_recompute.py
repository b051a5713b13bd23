"""Blocks that are computed again in the backward pass: the same numbers, with less memory."""

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.trainer.models import build_model
from tests.distributed import run_ranks

NETS: dict[str, dict[str, Any]] = {
    "batch norm": {"name": "whitening_cnn", "widths": [8, 8]},
    "stochastic depth": {"name": "torchvision/efficientnet_b0", "dropout": 0.3},
}
SHAPES = {"batch norm": (3, 16, 16), "stochastic depth": (3, 32, 32)}


def passes(section: dict[str, Any], shape: tuple[int, int, int], rank: int = 0) -> dict[str, Tensor]:
    """Two forward and backward passes: gradients and buffers."""
    torch.manual_seed(0)
    options = {"sync_batch_norm": False, "pretrained": False, **section}
    if not options["name"].startswith("torchvision/"):
        del options["pretrained"]
    model = copy.deepcopy(build_model(options, shape, 5))  # as formats are measured on copies
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(rank))
    for seed in range(2):
        torch.manual_seed(seed)
        model(images).square().sum().backward()
    assert not model.eval()(images).isnan().any()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None} | dict(
        model.named_buffers()
    )


@pytest.mark.parametrize("net", NETS)
def test_gradients_and_statistics_are_the_same(net: str) -> None:
    plain, recomputed = (
        passes(NETS[net] | {"checkpoint_activations": wanted}, SHAPES[net]) for wanted in (False, True)
    )
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain | recomputed)


def pass_in_rank(wanted: bool) -> dict[str, list]:
    """Runs in a rank, with statistics over all ranks."""
    section = NETS["batch norm"] | {"checkpoint_activations": wanted, "sync_batch_norm": True}
    found = passes(section, SHAPES["batch norm"], int(os.environ["RANK"]))
    return {name: value.tolist() for name, value in found.items()}


def test_statistics_over_all_ranks_are_the_same() -> None:
    for plain, recomputed in zip(run_ranks(2, pass_in_rank, False), run_ranks(2, pass_in_rank, True), strict=True):
        assert plain == recomputed


def test_what_is_inside_the_blocks_is_not_kept() -> None:
    def kept_bytes(wanted: bool) -> int:
        torch.manual_seed(0)
        section = NETS["stochastic depth"] | {"sync_batch_norm": False, "checkpoint_activations": wanted}
        model, kept = build_model(section | {"pretrained": False}, (3, 32, 32), 5), []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randn(4, 3, 32, 32))
        return sum(kept)

    assert kept_bytes(True) < kept_bytes(False) / 2


def test_a_model_without_blocks_is_refused() -> None:
    section = {"name": "perceptron", "sync_batch_norm": False, "checkpoint_activations": True}
    with pytest.raises(InputError, match="checkpoint_activations=true has no effect"):
        build_model(section, (3, 8, 8), 3)


def test_a_block_stays_of_its_class() -> None:
    model = build_model(NETS["batch norm"] | {"sync_batch_norm": False, "checkpoint_activations": True}, (3, 16, 16), 5)
    assert all(isinstance(layer, nn.Module) and "Recomputed" not in type(layer).__name__ for layer in model.modules())
