"""Long tests on real images, for `make drills`."""

import json
from pathlib import Path

import pytest

from tests.launch.test_launch import FORMS, start


@pytest.mark.drill
def test_quickstart_learns_what_its_head_says(cifar10_source: Path, tmp_path: Path) -> None:
    """The default recipe, from images to the end, on two ranks: the result must not depend on their number."""
    result = start(*FORMS["torchrun 2"], "quickstart", cwd=tmp_path, timeout_s=1200)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["eval"]["accuracy"] >= 0.85
