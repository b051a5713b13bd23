"""torch's compiler is imported when something is compiled, and not before."""

import subprocess
import sys

import pytest

from tests.runs import train_ranks, write_recipe

BEGIN = "import sys, torch; from shardstep.trainer.distributed.lazy_dynamo import defer_compiler; defer_compiler()\n"
TRAIN = """
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.Adam(model.parameters())
def step():
    optimizer.zero_grad()
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
step()
"""


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_step_does_not_import_the_compiler():
    run(TRAIN + "assert not [name for name in sys.modules if name.startswith('torch._dynamo.')]")


def test_what_is_not_to_be_compiled_can_be_said_in_all_ways():
    ways = "torch.compiler.disable()", "torch.compiler.disable(recursive=False)", "torch._dynamo.disable"
    run(
        "\n".join(f"assert {way}(lambda: 5)() == 5" for way in ways)
        + "\nassert 'torch._dynamo.config' not in sys.modules"
    )


@pytest.mark.parametrize("statement", [
    pytest.param("import torch._dynamo.config; assert torch._dynamo.config is sys.modules['torch._dynamo.config']",
                 marks=pytest.mark.drill),
    pytest.param("from torch._dynamo.backends.registry import list_backends; assert list_backends()",
                 marks=pytest.mark.drill),
    "assert torch._dynamo.config.recompile_limit > 0",
    "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2",
])  # fmt: skip
def test_the_compiler_is_there_when_it_is_asked_for(statement):
    run(f"{TRAIN}{statement}\nassert 'stand' not in type(torch._dynamo).__name__.lower()\nstep()")


def test_a_part_of_the_compiler_is_executed_once_and_keeps_its_spec():
    run("import torch._dynamo.config as config; assert config.__spec__.origin.endswith('config.py')")


HEAVY = {"torchvision", "torchmetrics", "matplotlib", "wandb", "pandas", "sympy", "cv2", "scipy", "sklearn",
         "torch._dynamo.config", "torch._inductor", "torch.distributed.tensor"}  # fmt: skip


def test_a_run_comes_to_its_first_step_without_the_libraries_that_it_does_not_use(shards, tmp_path):
    """Each of them takes a tenth of a second to several seconds of every start: counted, because time is noisy."""
    recipe = write_recipe(tmp_path, shards, optimizer={"name": "adam"})
    train_ranks(1, recipe, "train.duration=1 steps", "run.resume=never")  # leaves the decoded images behind
    run(f"""
import os
from shardstep.launch import train
from shardstep.trainer import loop
def first_step(*arguments):
    found = {HEAVY!r} & set(sys.modules)
    print(*found, file=sys.stderr, flush=True)
    os._exit(len(found))
loop.train_step = first_step
train.main([{str(recipe)!r}, 'run.resume=never'])
""")
