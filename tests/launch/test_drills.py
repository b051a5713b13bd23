"""Long tests on real images, for `make drills`."""

import json
from pathlib import Path

import pytest

from tests.launch.test_launch import FORMS, start


@pytest.mark.drill
def test_quickstart_learns_what_its_head_says(cifar10_source: Path, tmp_path: Path) -> None:
    """The default recipe, from images to the end, on two ranks: the result must not depend on their number."""
    result = start(*FORMS["torchrun 2"], "quickstart", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["eval"]["accuracy"] >= 0.85


@pytest.mark.drill
def test_real_images(cifar10_source: Path, tmp_path: Path) -> None:
    """CIFAR-10 from its source to shards, and a hundred steps of learning on it."""
    result = start(*FORMS["shardstep"], "quickstart", "train.duration=100 steps", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert (summary["data"]["train_samples"], summary["data"]["test_samples"]) == (50_000, 10_000)
    assert summary["eval"]["accuracy"] > 0.5  # guessing gives 0.1
    manifest = json.loads((tmp_path / "data" / "cifar10" / "train" / "manifest.json").read_text())
    assert manifest["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)  # as published
    assert manifest["std"] == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)
