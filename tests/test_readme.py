"""README and docs are true: links resolve, names exist, and every command runs or is checked."""

import configparser
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from shardstep.configs.load import recipe_names
from shardstep.configs.schema import OPEN_SECTIONS, Recipe
from shardstep.launch.cli import COMMANDS
from shardstep.launch.submit import main as submit
from tests.conftest import ROOT
from tests.datasets.test_sources import png
from tests.distributed import HANG_S, run_command

FROM_THE_DOCUMENTS = "docs/from-the-documents.md"
RECIPES = "docs/recipes.md"
RESUMING = "docs/resuming.md"  # its commands are about the runs that are there
SLURM = "slurm/README.md"
OPTIMIZERS = "docs/optimizers.md"  # written by `shardstep compare`, not by hand
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES, SLURM]
FOLDERS = "configs|datasets|trainer|launch|tests|slurm|docs|examples"
MOST_WORDS = 950  # of the README: a newcomer takes it in within minutes


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def commands_of(document: str) -> list[str]:
    """The commands of a document's bash blocks, without comments, continued lines joined."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text_of(document), flags=re.DOTALL)).replace("\\\n", " ")
    lines = (line.partition("  #")[0].partition(" #")[0].strip() for line in blocks.splitlines())
    return [line for line in lines if line and not is_to_come(line)]


def files_of(document: str) -> dict[str, str]:
    """The python and yaml blocks of a document that begin with the name of a file, as in `# net.py`."""
    blocks = re.findall(r"```(?:python|yaml)\n(# ([\w/]+\.(?:py|yaml))\n.*?)```", text_of(document), flags=re.DOTALL)
    return {name: text for text, name in blocks}


def is_to_come(command: str) -> bool:
    """Whether a command waits for `shardstep recipes` and `shardstep keys`, which come together with --show-config."""
    words = command.split()
    return "keys" not in COMMANDS and (
        words[:2] in (["shardstep", "recipes"], ["shardstep", "keys"]) or "--show-config" in words
    )


def anchors(document: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = text_of(document)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if target.startswith("https://"):
            continue
        path = (ROOT / document).parent.joinpath(target) if target else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in anchors(str(path.resolve().relative_to(ROOT))), f"{target}#{anchor}"
    for path in re.findall(rf"`((?:{FOLDERS})/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_from_the_readme() -> None:
    readme = text_of("README.md")
    assert not [page for page in [*PAGES, SLURM] if f"]({page})" not in readme]


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= MOST_WORDS


def test_everything_that_can_be_named_is_on_the_documents_page() -> None:
    from shardstep.trainer.models import MODELS, layers
    from shardstep.trainer.optim import losses, optimizers

    text = text_of(FROM_THE_DOCUMENTS)
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
    makefile = text_of("Makefile")
    for document in DOCUMENTS:
        for target in re.findall(r"`?make (setup|train|smoke|test|drills|lint|\w+`)", text_of(document)):
            assert re.search(rf"^{target.rstrip('`')}:", makefile, flags=re.MULTILINE), target


def test_every_recipe_is_in_the_table() -> None:
    names = re.findall(r"^\| (`[\w` ]+`) \|", text_of(RECIPES), flags=re.MULTILINE)
    assert {name for row in names for name in re.findall(r"\w+", row)} == set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_head_has_its_command_and_a_result(name: str) -> None:
    """What `shardstep recipes` reads: a sentence, the command, and a paragraph that begins with the hardware."""
    head = re.match(r"(?:#.*\n)+", text_of(f"configs/{name}.yaml"))
    assert head
    what, command, result, *_ = head[0].replace("# ", "").replace("#", "").strip("\n").split("\n\n")
    assert re.match(r"[A-Z].*?\.(\s|$)", what, flags=re.DOTALL)
    assert re.fullmatch(rf"  shardstep train {name}( data.source=\S+)?", command.splitlines()[0])
    assert re.match(r"(\d cores? of an |Not yet run)", result), "the result comes without its hardware"
    assert re.search(r"torch 2\.\d+", result), "no versions"
    assert re.search(r"\(n = \d\)|^Not yet run", result), "no number of runs"


# --- what the documents name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != OPTIMIZERS])
def test_keys_exist(document: str) -> None:
    sections = {section.name: section.default_factory() for section in fields(Recipe)}  # type: ignore[misc]
    known = {name: {field.name for field in fields(one)} for name, one in sections.items() if is_dataclass(one)}
    for section, key in re.findall(r"(?<![\w/.])(" + "|".join(known) + r")\.(\w+)=", text_of(document)):
        assert key in known[section], f"{section}.{key}"
    assert set(known) | set(OPEN_SECTIONS) == set(sections)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != OPTIMIZERS])
def test_commands_and_their_options_exist(document: str, helps: dict[str, str]) -> None:
    quoted = re.findall(r"`(shardstep [^`]+)`", text_of(document).replace("\n", " "))
    for command in [*commands_of(document), *(line for line in quoted if not is_to_come(line))]:
        words = command.split()
        if words[0] != "shardstep" or words[1].startswith("-") or not words[1].islower():
            continue
        assert words[1] in COMMANDS, command
        for option in (word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")):
            assert option in helps[words[1]], f"{command}: no option {option}"


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each command's --help prints, with those of its subcommands, such as `shards write`."""
    found = {}
    for name in COMMANDS:
        main = import_module(f"shardstep.launch.{name}").main
        first = _help(main, [])
        kinds = re.search(r"\{([a-z,]+)\}", first) if name in ("shards", "checkpoints", "bench") else None
        found[name] = first + "".join(_help(main, [kind]) for kind in (kinds[1].split(",") if kinds else []))
    return found


def _help(main: Callable[[list[str]], int], arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return out.getvalue()


def test_extras_that_are_installed_exist() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = re.findall(r"(?:-e '\.|shardstep)\[([\w,]+)\]", " ".join(map(text_of, DOCUMENTS)))
    assert named
    assert {extra for names in named for extra in names.split(",")} <= set(setup["options.extras_require"])


# --- commands that run --------------------------------------------------------------------------------------------


def runs_here(command: str) -> bool:
    """Whether a command needs no network, no second machine, and no checkout of its own."""
    return command.split()[0] not in ("make", "python3", "pip", ".venv/bin/pip", ".") and "--nnodes" not in command


PAGES_WITH_COMMANDS = [page for page in PAGES if any(map(runs_here, commands_of(page)))]


@pytest.mark.parametrize(
    "document", ["README.md", *(pytest.param(page, marks=pytest.mark.drill) for page in PAGES_WITH_COMMANDS)]
)
def test_commands_run(document: str, tmp_path: Path) -> None:
    """On a small set: quickstart becomes smoke, and trains for one step. Files that the document shows are there."""
    for name, text in files_of(document).items():
        (tmp_path / name).write_text(text)
    for split in ("train", "test"):
        for number in range(80):  # more than the batch of photos
            path = tmp_path / "path" / "to" / "images" / split / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number * 3, size=(40, 36)))
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}\n" for path in sorted(tmp_path.rglob("*.png"))]
    (tmp_path / "path" / "to" / "labels.csv").write_text("".join(["image,label\n", *rows]))
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in filter(runs_here, commands_of(document)):
        words = shlex.split(command.replace("quickstart", "smoke"))
        if words[1:2] in (["train"], ["doctor"]) or any(word.endswith(("train.py", "doctor.py")) for word in words):
            words += ["train.duration=1 steps"]
            words += ["run.resume=never"] * (document != RESUMING)
        if words[1:2] == ["submit"]:
            words += ["train.device=auto"]  # smoke's is cpu, which leaves the GPUs that are asked for unused
        if words[0] == "shardstep":
            result = run_command(*words[1:], cwd=tmp_path)
        else:
            result = subprocess.run(
                words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG_S
            )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def test_commands_for_slurm_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    """Each `shardstep submit` is checked and written, each `sbatch` names a script of ours."""
    commands = [shlex.split(command) for command in commands_of(SLURM)]
    for words in commands:
        if words[:2] == ["shardstep", "submit"]:
            assert submit([*words[2:], "--dry-run"]) == 0
            assert "srun --nodes" in capsys.readouterr().out
        elif words[0] == "sbatch":
            (script,) = (word for word in words if word.endswith(".sbatch"))
            assert (ROOT / script).is_file()
        else:
            assert words[:3] == ["shardstep", "shards", "write"]  # of CIFAR-10: its options are checked above
    assert len(commands) >= 7


def test_commands_for_several_machines_name_a_script_and_a_recipe() -> None:
    commands = [shlex.split(line) for page in ["README.md", *PAGES] for line in commands_of(page) if "--nnodes" in line]
    assert commands
    for *_, script, recipe in commands:
        assert (ROOT / script).is_file()
        assert recipe in recipe_names()


@pytest.mark.drill
@pytest.mark.parametrize("document", [page for page in PAGES if "```python" in text_of(page)])
def test_python_blocks_run(document: str, tmp_path: Path) -> None:
    """One after another, in one process."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", text_of(document), flags=re.DOTALL))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    assert result.returncode == 0, result.stdout + result.stderr
