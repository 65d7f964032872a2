"""Hydra's command line with errors that say what is allowed."""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from runs.text_keys import quote_text

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
CONFIGS = {"config": "run_settings", "train_prior": "training_settings"}
SCHEMAS: dict[str, type] = {}
"""Registered schemas by name."""
FAILED, BAD_INPUT, NOTHING, INTERRUPTED = 1, 2, 3, 130


def register(name: str, node: type) -> None:
    """Make a dataclass known as the schema ``name`` of a configuration."""
    ConfigStore.instance().store(name=name, node=node)
    SCHEMAS[name] = node


def literal(config_name: str, arguments: list[str]) -> list[str]:
    """Arguments in which text stays as it was typed, see :mod:`runs.text_keys`."""
    schema = SCHEMAS.get(CONFIGS.get(config_name))
    return arguments if schema is None else quote_text(arguments, schema)


def compose_config(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose ``configs/<config_name>.yaml`` with overrides, outside Hydra's own main."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(config_name, literal(config_name, overrides))


def all_keys(config: Any, prefix: str = "") -> list[str]:
    """Every key of a composed configuration, dotted."""
    keys = []
    for key in config:
        keys.append(prefix + str(key))
        if OmegaConf.is_dict(config) and not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config[key]):
            keys += all_keys(config[key], f"{prefix}{key}.")
    return keys


def check_overrides(config_name: str, arguments: list[str]) -> str | None:
    """Try to compose; a sentence about what is wrong, or None."""
    overrides = [a for a in arguments if "=" in a or a.startswith("~")]
    if any(a.startswith("-") for a in arguments):
        return None  # an option of Hydra's own: --help, --cfg job, --multirun
    stray = [a for a in arguments if "=" not in a and not a.startswith("~")]
    if stray:
        return f"'{stray[0]}' is no override: write key=value, for example data.end_id=1"
    try:
        config = compose_config(config_name, overrides)
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        return f"{error.full_key} is not set: add {error.full_key}=VALUE"
    except (HydraException, OmegaConfBaseException) as error:
        return explain(config_name, overrides, error)
    return None


def explain(config_name: str, overrides: list[str], error: Exception) -> str:
    """Name the override that does not compose, why, and what would."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = str(root if isinstance(root, OmegaConfBaseException) else error).strip().splitlines()[0]
    known = compose_config(config_name, [])
    groups = sorted(p.name for p in CONFIG_DIR.iterdir() if p.is_dir() and p.name != "hydra")
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in groups:
            options = sorted(p.stem for p in (CONFIG_DIR / key).glob("*.yaml"))
            if value not in options:
                return f"{key}={value}: allowed are {', '.join(options)}"
            continue
        keys = all_keys(known)
        if key not in keys and not key.startswith("hydra") and not _open_ended(key):
            close = difflib.get_close_matches(key, keys, n=3)
            siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
            hint = f"did you mean {' or '.join(close)}?" if close else f"allowed are {', '.join(siblings or keys)}"
            return f"{key}: unknown key; {hint}"
        if _open_ended(key) and not override.startswith(("+", "~")) and f"'{key.rpartition('.')[2]}'" in reason:
            return f"{override}: {key} has no default here, and a new key takes a plus: +{override}"
        try:
            compose_config(config_name, [override])
        except (HydraException, OmegaConfBaseException):
            return f"{override}: {reason}"
    key = getattr(error, "full_key", None)
    return f"{key}: {reason}" if key else reason


def _open_ended(key: str) -> bool:
    return key.startswith(("model.options.", "task.options.", "task.mcmc."))


def run(program: str, config_name: str, hydra_main: Callable[[], Any]) -> None:
    """Check the command line, then hand over to a ``hydra.main`` function; errors end in one sentence.

    Exit status: 0; 1 if an image failed; 2 for input that cannot be used; 3 if nothing came out of an image (every
    particle diverged); 130 after Ctrl-C.
    """
    problem = check_overrides(config_name, sys.argv[1:])
    if problem is not None:
        fail(program, problem)
    sys.argv[1:] = literal(config_name, sys.argv[1:])
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    hydra_main()


def fail(program: str, message: str, status: int = BAD_INPUT) -> None:
    """Print ``message`` to stderr and leave."""
    print(f"{program}: {message}", file=sys.stderr)
    raise SystemExit(status)
