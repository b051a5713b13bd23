"""How long OpenMP's idle threads spin before they sleep: seen in libgomp itself, which torch loads."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.distributed import HANG_S


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
    ids=["ours", "a person's count", "a person's policy"],
)
def test_idle_threads_spin_for_a_moment(given: dict[str, str], spins: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "smoke", "--show-config"],
        env=environment | given | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    found = set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr))
    assert found == {spins}, result.stderr
