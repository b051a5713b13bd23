"""Benchmark of the start: seconds from a command to its first optimizer step, with warm files, and of the imports it needs.

Each work is a separate process. A run ends after its first step. Give data.train=DIR data.test=DIR if quickstart's shards are
not in their default folders.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from shardstep.launch.benchmarks.bench_tables import Table, add_clock_option, importable, in_turn, seconds

_OWN_IMPORTS = "import shardstep.launch.train, shardstep.trainer.loop, shardstep.trainer.setup"
_FIRST_STEP = "import sys; from shardstep.launch.benchmarks.bench_startup import first_step; first_step(sys.argv[1:])"
_HELP = "import sys; from shardstep.launch.cli import main; sys.exit(main())"
_LIGHTNING = """
import os, torch, lightning
class Small(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 2)
    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())
    def on_train_batch_end(self, *arguments):
        os._exit(0)
data = torch.utils.data.TensorDataset(torch.rand(64, 8), torch.zeros(64, dtype=torch.long))
lightning.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False).fit(Small(), torch.utils.data.DataLoader(data, batch_size=16))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_clock_option(parser)
    text = "overrides of quickstart, such as data.train=DIR"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)


def measure(args: argparse.Namespace, folder: Path) -> list[Table]:
    """Measure the seconds of imports, `--help` and starts."""
    from shardstep.datasets.manifest import MANIFEST_NAME

    notes = []
    works = {
        "import torch": _python(folder, "import torch"),
        "import torch, accelerate": _python(folder, "import torch, accelerate"),
        "import all that a run starts with": _python(folder, _OWN_IMPORTS),
        "shardstep --help": _python(folder, _HELP, "--help"),
        "smoke: a small recipe, to its first step": _start("smoke", folder, _smoke_data(folder)),
    }
    quickstart = _absolute(args.overrides)
    if all((Path(text.partition("=")[2]) / MANIFEST_NAME).is_file() for text in quickstart[-2:]):
        works["quickstart, to its first step"] = _start("quickstart", folder, quickstart)
    else:
        notes.append("quickstart is left out: no shards found; give data.train=DIR data.test=DIR")
    if importable("lightning"):
        works["Lightning: a linear layer, to its first step"] = _python(folder, _LIGHTNING)
    else:
        notes.append("Lightning is not installed")
    values = in_turn({name: seconds(work, args.clock) for name, work in works.items()}, args.repeats)
    return [Table(f"start of a command, warm files, {args.clock} time", "s", values, "import torch", notes)]


def first_step(arguments: list[str]) -> NoReturn:
    """Train like the command, and end the process after the first optimizer step."""
    from shardstep.launch import train
    from shardstep.trainer import loop

    take_step = loop.train_step

    def take_one(*parts, **named):  # type: ignore[no-untyped-def]
        take_step(*parts, **named)
        os._exit(0)

    loop.train_step = take_one
    train.main(arguments)
    raise AssertionError("training ended before its first step")


def _python(folder: Path, code: str, *arguments: str) -> Callable[[], None]:
    """Return a work: a process that runs some code; its output is shown only if it fails."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # warm files: an earlier start has compiled each module

    def work() -> None:
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            output = result.stdout + result.stderr
            raise RuntimeError(f"exit code {result.returncode} of {code!r} {arguments}:\n{output}")

    return work


def _start(recipe: str, folder: Path, overrides: list[str]) -> Callable[[], None]:
    return _python(folder, _FIRST_STEP, recipe, *overrides, f"run.dir={folder / recipe}", "run.resume=never")


def _smoke_data(folder: Path) -> list[str]:
    from shardstep.datasets.write import write_shards

    for split in ("train", "test"):
        write_shards("synthetic:320", split, folder / split)
    return [f"data.{split}={folder / split}" for split in ("train", "test")]


def _absolute(overrides: list[str]) -> list[str]:
    """Return overrides with absolute data folders, because the processes start in another folder."""
    from shardstep.configs.load import load_recipe
    from shardstep.trainer.validate_recipe import validate_recipe

    data = validate_recipe(load_recipe("quickstart", overrides)).data
    return [*overrides, f"data.train={Path(data.train).resolve()}", f"data.test={Path(data.test).resolve()}"]
