"""The documents are true: links lead somewhere, and the README's commands run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from shardstep.launch.submit import main as submit
from tests.conftest import ROOT
from tests.datasets.test_sources import png

FROM_THE_DOCUMENTS = "docs/from-the-documents.md"
SLURM = "slurm/README.md"
DOCUMENTS = ["README.md", "CONTRIBUTING.md", FROM_THE_DOCUMENTS, "docs/performance.md", SLURM]
README = (ROOT / "README.md").read_text()


def commands_of(document: str) -> list[str]:
    """The commands of a document's bash blocks, without comments, continued lines joined."""
    text = (ROOT / document).read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    lines = (line.partition("  #")[0].partition(" #")[0].strip() for line in blocks.splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target
    for path in re.findall(r"`((?:configs|datasets|trainer|launch|tests|slurm)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


def test_everything_that_can_be_named_is_on_the_documents_page() -> None:
    from shardstep.trainer.models import MODELS, layers
    from shardstep.trainer.optim import losses, optimizers

    text = (ROOT / FROM_THE_DOCUMENTS).read_text()
    ours = {name for name, function in optimizers.OPTIMIZERS.items() if function.__module__ == optimizers.__name__}
    names = {
        *MODELS,
        *losses.LOSSES,
        *ours,
        *get_args(layers.Activation),
        *get_args(layers.Pooling),
        "rnn",
        "lstm",
        "gru",
    }
    missing = {name for name in names - {"adamw", "filter_muon"} if not re.search(rf"`(?:[\w.]+=)?{name}`", text)}
    assert not missing


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"`?make (\w+)", (ROOT / document).read_text()):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_recipe_is_in_the_table() -> None:
    table = README.split("## Recipes")[1].split("##")[0]
    rows = {
        name for row in re.findall(r"^\| (`[\w` ]+`) \|", table, flags=re.MULTILINE) for name in re.findall(r"\w+", row)
    }
    assert rows == {path.stem for path in (ROOT / "configs").glob("*.yaml")}


def test_every_recipe_head_has_its_command_and_a_result() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        head = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
        assert "shardstep train" in head, path
        assert re.search(r"torch 2\.\d+", head), f"{path}: no measured result with its versions"


def test_commands_run(tmp_path: Path) -> None:
    """Every command but make's, on a small set: quickstart becomes smoke, for one step."""
    for split in ("train", "test"):
        for number in range(40):
            path = tmp_path / "path" / "to" / "images" / split / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number * 6, size=(40, 36)))
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = [command for command in commands_of("README.md") if not command.startswith("make")]
    assert len(commands) >= 9
    for command in commands:
        words = shlex.split(command.replace("quickstart", "smoke"))
        if words[1:2] in (["train"], ["doctor"]) or any(word.endswith(("train.py", "doctor.py")) for word in words):
            words += ["run.resume=never", "train.duration=1 steps"]
        if words[1:2] == ["submit"]:
            words += ["train.device=auto"]  # smoke's is cpu, which is no use of the GPUs that are asked for
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def test_commands_for_slurm_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    """Each `shardstep submit` is checked and written, each `sbatch` names a script of ours."""
    commands = [shlex.split(command) for command in commands_of(SLURM)]
    for words in commands:
        if words[0] == "shardstep":
            assert submit([*words[2:], "--dry-run"]) == 0
            assert "srun --nodes" in capsys.readouterr().out
        else:
            (script,) = (word for word in words if word.endswith(".sbatch"))
            assert (ROOT / script).is_file()
    assert len(commands) >= 7
