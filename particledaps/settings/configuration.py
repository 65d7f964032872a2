"""The configuration that a command line starts from, composed outside of Hydra's own main."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from particledaps.checkout import ROOT
from particledaps.settings.text_keys import quote_text

CONFIG_DIR = ROOT / "configs"
CONFIGS = {"config": "run_settings", "train_prior": "training_settings", "generate": "generate_settings"}
SCHEMAS: dict[str, type] = {}
"""Registered schemas by name."""


def register(name: str, node: type) -> None:
    """Make a dataclass known as the schema ``name`` of a configuration."""
    ConfigStore.instance().store(name=name, node=node)
    SCHEMAS[name] = node


@dataclass(frozen=True)
class Configuration:
    """Names a configuration; without options of Hydra's own, ``configs/<program>.yaml``.

    Attributes:
        program: the configuration that the program has been written for, a key of :data:`CONFIGS`.
        name: of the file; that of the program, or another one (``--config-name``).
        folder: that holds it (``--config-path``).
        extra: a further folder, looked into first (``--config-dir``).
    """

    program: str
    name: str
    folder: Path = CONFIG_DIR
    extra: Path | None = None

    @property
    def schema(self) -> type | None:
        """Dataclass of the settings, where one is registered."""
        return SCHEMAS.get(CONFIGS.get(self.program, ""))

    def compose(self, overrides: list[str]) -> DictConfig:
        """The settings with ``overrides``, without Hydra's own.

        Raises:
            HydraException, OmegaConfBaseException, yaml.YAMLError: they do not compose.
        """
        with self.loader() as loader:
            config = loader.load_configuration(self.name, self.literal(overrides), RunMode.RUN, from_shell=False)
        with open_dict(config):
            del config["hydra"]
        return config

    def literal(self, arguments: list[str], sweep: bool = False) -> list[str]:
        """Arguments in which text stays as it was typed, see :mod:`particledaps.settings.text_keys`."""
        return arguments if self.schema is None else quote_text(arguments, self.schema, sweep)

    def options(self, group: str) -> list[str]:
        """Files of a group, sorted."""
        with self.loader() as loader:
            return sorted(loader.get_group_options(group, ObjectType.CONFIG))

    def groups(self) -> list[str]:
        """Names of the groups, without Hydra's own."""
        with self.loader() as loader:
            return sorted(set(loader.get_group_options("", ObjectType.GROUP)) - {"hydra"})

    @contextmanager
    def loader(self) -> Iterator[ConfigLoader]:
        """Hydra's loader of configurations."""
        version.setbase("1.3")
        path = create_config_search_path(str(self.folder))
        if self.extra is not None:
            path.prepend("command-line", f"file://{self.extra}", SearchPathQuery(provider="schema"))
        GlobalHydra.instance().clear()
        try:
            yield Hydra.create_main_hydra2(task_name="app", config_search_path=path).config_loader
        finally:
            GlobalHydra.instance().clear()
