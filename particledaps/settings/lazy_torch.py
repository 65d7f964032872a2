"""torch, loaded when it is first used: help is printed and settings are checked without its seconds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """Stands for a package until one of its attributes or submodules is asked for."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]  # from here on a module like any other
        spec = self.__spec__
        if spec is None or spec.loader is None:
            raise ImportError(f"{self.__name__} cannot be loaded: nobody says from where")
        self.__path__ = list(spec.submodule_search_locations or ())
        try:
            spec.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(self.__name__, None)  # the next import begins anew
            raise
        if name == "__path__":  # Python imports a submodule, which is loaded by now, and would load it again
            sys.meta_path.insert(0, LoadedMeanwhile(self.__name__))
        return getattr(self, name)


class LoadedMeanwhile(MetaPathFinder, Loader):
    """Finds, once, the submodule that was loaded with its package while Python was about to look for it."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        sys.meta_path.remove(self)
        is_there = name.startswith(f"{self.package}.") and name in sys.modules
        return ModuleSpec(name, self) if is_there else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.module = sys.modules[spec.name]
        self.spec = self.module.__spec__
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def load_torch_when_used() -> None:
    """``import torch`` takes no time from here on; its first use does. Call before anything imports it."""
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None or spec.loader is None:  # it is there, or its import says that it is not
        return
    module = importlib.util.module_from_spec(spec)
    del module.__path__  # asked for by who imports a submodule, which needs all of it
    module.__class__ = LazyModule
    sys.modules["torch"] = module
