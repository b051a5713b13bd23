"""Start torch without its compiler, until something is compiled.

torch (2.15) imports torch._dynamo, which takes 1.5 s, only to exclude its optimizers and DDP from compilation. Here a
stand-in module handles these few calls, and replaces itself by the real one when anything else is used.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_NAME = "torch._dynamo"


def defer_compiler() -> None:
    """Defer the import of torch's compiler until it is needed; do nothing if it is already imported."""
    if _NAME not in sys.modules:
        sys.modules[_NAME] = torch._dynamo = _StandIn()
        sys.meta_path.insert(0, _SubmoduleFinder())


class _StandIn(ModuleType):
    def __init__(self) -> None:
        super().__init__(_NAME)
        self.__path__ = []  # makes it a package; _SubmoduleFinder finds its submodules

    graph_break = staticmethod(lambda: None)
    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)
    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")
    eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))  # no model is one

    @staticmethod
    def disable(function: Callable[..., Any] | None = None, *options: Any, **more: Any) -> Callable[..., Any]:
        """Return a wrapper that calls `function` as it is until the compiler is imported, and disabled after that.

        torch keeps the wrapper for good. Without a function, return a decorator.
        """
        if function is None:
            return lambda later: _StandIn.disable(later, *options, **more)
        disabled: list[Callable[..., Any]] = []

        def call(*arguments: Any, **keywords: Any) -> Any:
            if isinstance(sys.modules[_NAME], _StandIn):
                return function(*arguments, **keywords)
            if not disabled:
                disabled.append(sys.modules[_NAME].disable(function, *options, **more))
            return disabled[0](*arguments, **keywords)

        return call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a search through all modules, as inspect does
            raise AttributeError(name)
        return getattr(_import_compiler(), name)


class _SubmoduleFinder(MetaPathFinder, Loader):
    """Imports the real package when a submodule of it is imported, and returns that submodule."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.startswith(f"{_NAME}.") and isinstance(sys.modules.get(_NAME), _StandIn):
            _import_compiler()
            return ModuleSpec(name, self, loader_state=importlib.import_module(name).__spec__)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__ and module.__spec__.loader_state  # the import of the package has executed it


def _import_compiler() -> ModuleType:
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME], torch._dynamo
    return importlib.import_module(_NAME)
