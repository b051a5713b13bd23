"""In a notebook, on a real kernel: docs/notebook.ipynb runs, the bar is updated in place, the stop button saves."""

import json
import queue
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.distributed import HANG_S
from tests.launch.python.test_calls import wait_for
from tests.runs import train_lines, write_recipe

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
manager = pytest.importorskip("jupyter_client.manager")
pytest.importorskip("ipykernel")
pytest.importorskip("pandas")

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
MOST_BYTES = 150_000  # of the notebook with its outputs
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*without encryption")


def outputs_of(cell: Any) -> str:
    """Everything that a cell has put out, as text."""
    return json.dumps(cell["outputs"])


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_small_and_stored_as_it_ran(stored: Any) -> None:
    assert len(stored.cells) == 10
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not re.findall(r"/(?:tmp|root|home|work|usr)/|Traceback|Warning", "".join(map(outputs_of, cells)))


@pytest.mark.drill
def test_the_notebook_runs(stored: Any, tmp_path: Path) -> None:
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=HANG_S, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (training,) = (cell for cell in code if "shardstep.train(" in cell.source)
    (area,) = (output for output in training.outputs if output.output_type == "display_data")
    assert area.data["text/plain"].startswith("100%  step ")
    assert '<progress value="1.000"' in area.data["text/html"]
    text = "".join(output.get("text", "") for output in training.outputs)
    assert text.count("done: test accuracy") == 1
    assert len(re.findall(r"^epoch ", text, flags=re.MULTILINE)) == 8  # one line an evaluation, none for log steps
    before = [cell for cell in stored.cells if cell.cell_type == "code"]
    for cell, other in zip(code, before, strict=True):
        kinds = [
            {frozenset(output.get("data", {})) for output in one.outputs if "data" in output} for one in (cell, other)
        ]
        assert kinds[0] == kinds[1], cell.source  # what is stored looks like what comes
    assert "IProgress" not in "".join(map(outputs_of, code))


class Kernel:
    """A kernel, and what it puts out."""

    def __init__(self, folder: Path):
        self.manager = manager.KernelManager()
        self.manager.start_kernel(cwd=str(folder))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=HANG_S)

    def start(self, code: str) -> str:
        """Start a cell; returns its id."""
        return str(self.client.execute(code))

    def finish(self, cell: str) -> tuple[str, list[str]]:
        """Wait for the end of a cell; returns its text, and the kinds of its other messages."""
        text, kinds = "", []
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != cell:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text += content["text"]
            elif kind == "status" and content["execution_state"] == "idle":
                return text, kinds
            else:
                kinds.append(kind)
                text += "\n".join(content.get("traceback", []))
        raise AssertionError(f"the cell has not ended: {text}")


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    started = Kernel(tmp_path)
    yield started
    started.client.stop_channels()
    started.manager.shutdown_kernel(now=True)


@pytest.mark.drill
@pytest.mark.parametrize("nproc", [1, 2])
def test_the_stop_button_saves_and_the_cell_goes_on(nproc: int, kernel: Kernel, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    train = "run = shardstep.train({!r}, 'train.duration={} steps', 'run.allow_changes=[train.duration]', nproc={})"
    cell = kernel.start(f"import shardstep; {train.format(str(recipe), 1_000_000, nproc)}; print(run.state)")
    wait_for(tmp_path / "run" / "metrics.jsonl")
    kernel.manager.interrupt_kernel()
    text, kinds = kernel.finish(cell)
    assert text.endswith("stopped\n"), text
    assert "by SIGINT: step" in text
    assert kinds.count("display_data") == 1
    assert "update_display_data" in kinds
    step = json.loads((tmp_path / "run" / "summary.json").read_text())["step"]
    text, _ = kernel.finish(kernel.start(f"{train.format(str(recipe), step + 3, nproc)}; print(run.state, run.step)"))
    assert text.endswith(f"finished {step + 3}\n"), text
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, step + 4))  # each once


@pytest.mark.drill
def test_a_run_saves_when_its_kernel_is_restarted(kernel: Kernel, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    kernel.start(f"import shardstep; shardstep.train({str(recipe)!r}, 'train.duration=1000000 steps')")
    wait_for(tmp_path / "run" / "metrics.jsonl")
    kernel.manager.restart_kernel(now=True)
    wait_for(tmp_path / "run" / "summary.json")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "preempted"


@pytest.mark.drill
def test_errors_in_a_notebook_are_one_message(kernel: Kernel) -> None:
    text, kinds = kernel.finish(kernel.start("import shardstep; shardstep.train('smoke', 'optimizer.lrr=1')"))
    assert kinds[-1] == "error"
    assert "InputError: recipe smoke: optimizer.lrr is not an option of adam; did you mean lr?" in re.sub(
        r"\x1b\[[\d;]*m", "", text
    )
