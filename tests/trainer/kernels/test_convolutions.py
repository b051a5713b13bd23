"""Runs whose convolutions use another method than torch's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.runs import train_lines, train_ranks, train_until, write_recipe


@pytest.mark.parametrize(
    ("method", "precision", "model", "filters", "tolerance"),
    [
        ("winograd", "fp32", {"name": "article_cnn", "dropout": 0.0}, "2.weight", 1e-5),
        ("winograd", "bf16", {"name": "article_cnn", "dropout": 0.0}, "2.weight", 2e-2),
        ("unfold", "bf16", {"name": "whitening_cnn", "widths": [16, 128, 128]}, "groups.2.4.weight", 2e-2),
    ],
)
def test_a_run_trains_with_a_method_and_resumes_with_it(
    method: str, precision: str, model: dict[str, Any], filters: str, tolerance: float, shards: Path, tmp_path: Path
) -> None:
    train = {"precision": precision, "memory_format": "channels_last", "duration": "6 steps"}
    losses, trained = {}, {}
    for one in ("direct", method):
        recipe = write_recipe(tmp_path / one, shards, model=model, train=train | {"convolutions": one})
        train_ranks(1, recipe)
        losses[one] = [line["loss"] for line in train_lines(tmp_path / one / "run")]
        trained[one] = load_file(tmp_path / one / "run" / "model.safetensors")[filters]
    assert losses[method] == pytest.approx(losses["direct"], rel=tolerance)
    assert not torch.equal(trained[method], trained["direct"])  # it was at work, and rounds otherwise

    folder = tmp_path / "halves" / "run"
    recipe = write_recipe(tmp_path / "halves", shards, model=model, train=train | {"convolutions": method})
    run_ranks(1, train_until, str(recipe), 3, "checkpoint.every=1 steps")
    train_ranks(1, recipe, "checkpoint.every=1 steps")
    assert [line["loss"] for line in train_lines(folder)] == losses[method]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["convolutions"] == method
    assert torch.equal(load_file(folder / "model.safetensors")[filters], trained[method])
