"""Train image classifiers from Python, as the commands do.

    import shardstep

    run = shardstep.train("digits", "optimizer.lr=0.05", nproc=2)
    run.summary["eval"]["accuracy"]

setup.cfg installs this folder as the root of the import package. What it offers is imported when it is first used: the
commands import this file, too, and must start at once.
"""

import os
from typing import TYPE_CHECKING, Any

# In a clone the other folders lie elsewhere, and setuptools' finder skips datasets/, which has no __init__.py (setup.cfg).
_HERE = os.path.dirname(__file__)
if not os.path.isdir(os.path.join(_HERE, "datasets")):
    __path__.append(os.path.dirname(os.path.dirname(_HERE)))

if TYPE_CHECKING:
    from shardstep.configs.errors import InputError, TrainingFailed
    from shardstep.launch.python.calls import evaluate, predict, train
    from shardstep.launch.python.loaded_run import LoadedRun, load_run

    __version__: str

__all__ = ["InputError", "LoadedRun", "TrainingFailed", "__version__", "evaluate", "load_run", "predict", "train"]

_MODULES = {
    "InputError": "configs.errors",
    "TrainingFailed": "configs.errors",
    "evaluate": "launch.python.calls",
    "predict": "launch.python.calls",
    "train": "launch.python.calls",
    "LoadedRun": "launch.python.loaded_run",
    "load_run": "launch.python.loaded_run",
}


def __getattr__(name: str) -> Any:
    """Import what is used for the first time."""
    if name == "__version__":
        from importlib.metadata import version

        found = version("shardstep")
    elif name in _MODULES:
        from importlib import import_module

        found = getattr(import_module(f"shardstep.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'shardstep' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
