"""torch, loaded when it is first used: help is printed and settings are checked without its seconds."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """Stands for a package until one of its attributes or submodules is asked for."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType
        self.__path__ = list(self.__spec__.submodule_search_locations)
        try:
            self.__spec__.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(self.__name__, None)  # the next import begins anew
            raise
        return getattr(self, name)


def load_torch_when_used() -> None:
    """``import torch`` takes no time from here on; its first use does. Call before anything imports it."""
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None or spec.loader is None:  # it is there, or its import says that it is not
        return
    module = importlib.util.module_from_spec(spec)
    del module.__path__  # asked for by who imports a submodule, which needs all of it
    module.__class__ = LazyModule
    sys.modules["torch"] = module
