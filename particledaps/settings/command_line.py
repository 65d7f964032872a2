"""Hydra's command line with errors that say what is allowed."""

from __future__ import annotations

import difflib
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NoReturn

import yaml
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from particledaps.names import shown
from particledaps.settings import sweeps
from particledaps.settings.configuration import CONFIG_DIR, Configuration, register
from particledaps.settings.hydra_options import OptionError, composes_only, configuration_of, is_sweep, parse_options
from particledaps.settings.start_up import exit_stopped
from particledaps.settings.statuses import BAD_INPUT, DISK, disk_fault
from particledaps.settings.sweeps import member

__all__ = ["CONFIG_DIR", "exit_stopped", "member", "register"]  # what a program needs, in one place
NOT_COMPOSED = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def literal(config_name: str, arguments: list[str]) -> list[str]:
    """Arguments in which text stays as it was typed, see :mod:`particledaps.settings.text_keys`."""
    return Configuration(config_name, config_name).literal(arguments)


def compose_config(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose ``configs/<config_name>.yaml`` with overrides, outside Hydra's own main."""
    return Configuration(config_name, config_name).compose(overrides)


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
    try:
        parsed, _ = parse_options(arguments)
        if parsed.hydra_help or parsed.shell_completion:
            return None
        configuration = configuration_of(parsed, config_name)
    except OptionError as error:
        return str(error)
    stray = [a for a in parsed.overrides if "=" not in a and not a.startswith("~")]
    if stray:
        return f"'{stray[0]}' is no override: write key=value, for example data.end_id=1"
    return _check_members(configuration, parsed)


def _check_members(configuration: Configuration, parsed: Namespace) -> str | None:
    overrides = parsed.overrides
    try:
        for own in sweeps.members_to_check(configuration, overrides) if is_sweep(parsed) else [overrides]:
            overrides = own
            if problem := _check_values(configuration, configuration.compose(own), parsed):
                return problem
    except MissingMandatoryValue as error:
        return f"{error.full_key} is not set: add {error.full_key}=VALUE"
    except NOT_COMPOSED as error:
        return explain(configuration, overrides, error)
    return None


def _check_values(configuration: Configuration, config: DictConfig, parsed: Namespace) -> str | None:
    if configuration.schema is not None and OmegaConf.get_type(config) is not configuration.schema:
        return (
            f"--config-name {configuration.name}: must name the defaults of {configuration.program}.yaml, and does not"
        )
    if not composes_only(parsed) or parsed.resolve:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=not composes_only(parsed))
    part = parsed.package if parsed.cfg == "job" and parsed.package != "_global_" else None
    if part is not None and OmegaConf.select(config, part) is None:
        return f"--package {part}: there is no such part of the configuration"
    if is_sweep(parsed) and not str(config.save_dir).strip():
        return "save_dir='': name the folder of all results, such as results"
    return None


def explain(configuration: Configuration, overrides: list[str], error: Exception) -> str:
    """Name the override that does not compose, why, and what would."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    if isinstance(error, yaml.YAMLError):
        return f"a configuration file cannot be read: {' '.join(str(error).split())}"
    reason = str(root if isinstance(root, OmegaConfBaseException) else error).strip().splitlines()[0]
    try:
        keys, groups = all_keys(configuration.compose([])), configuration.groups()
    except NOT_COMPOSED:  # the fault lies in a file
        return f"{configuration.name}.yaml: {reason}"
    for override in overrides:
        if sentence := _explain_one(configuration, override, reason, keys, groups):
            return sentence
    key = getattr(error, "full_key", None)
    return f"{key}: {reason}" if key else reason


def _explain_one(
    configuration: Configuration, override: str, reason: str, keys: list[str], groups: list[str]
) -> str | None:
    """What is wrong with an override of its own, or None."""
    key, _, value = override.lstrip("+~").partition("=")
    if key in groups:
        options = configuration.options(key)
        return None if value in options else f"{key}={value}: allowed are {', '.join(options)}"
    if key not in keys and not key.startswith("hydra") and not _open_ended(key):
        return _unknown_key(key, keys)
    if _open_ended(key) and not override.startswith(("+", "~")) and f"'{key.rpartition('.')[2]}'" in reason:
        return f"{override}: {key} has no default here, and a new key takes a plus: +{override}"
    try:
        configuration.compose([override])
    except OverrideParseException:
        quoted = f"; text that holds signs of Hydra's grammar takes quotes: \"{override.partition('=')[0]}='{value}'\""
        return f"{override}: {reason}{quoted if _open_ended(key) else ''}"
    except NOT_COMPOSED:
        several = "; several values take -m" if reason.startswith("Ambiguous value") else ""
        return f"{override}: {reason}{several}"
    return None


def _unknown_key(key: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=3)
    siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
    hint = f"did you mean {' or '.join(close)}?" if close else f"allowed are {', '.join(siblings or keys)}"
    return f"{key}: unknown key; {hint}"


def _open_ended(key: str) -> bool:
    return key.startswith(("model.options.", "task.options.", "task.mcmc."))


def run(program: str, config_name: str, hydra_main: Callable[[], Any]) -> None:
    """Check the command line, then hand over to a ``hydra.main`` function; errors end in one sentence.

    Exit status: 0 or one of :mod:`particledaps.settings.statuses`; of a sweep, that of its worst member.
    """
    try:
        problem = check_overrides(config_name, sys.argv[1:])
        if problem is not None:
            fail(program, problem)
        parsed, arguments = parse_options(sys.argv[1:])
        configuration = configuration_of(parsed, config_name)
        more = sweeps.sweep_folder(configuration, parsed.overrides) if is_sweep(parsed) else []
        sys.argv[1:] = more + configuration.literal(arguments, is_sweep(parsed))
        _hand_over(program, configuration, parsed, hydra_main)
    except KeyboardInterrupt as stop:
        kept = "what is finished is kept, the same command goes on"
        exit_stopped(program, stop, kept if sweeps.STARTED else "nothing had begun")


def _hand_over(program: str, configuration: Configuration, parsed: Namespace, hydra_main: Callable[[], Any]) -> None:
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sweeps.ENDED.clear()
    sweeps.STARTED.clear()
    try:
        hydra_main()
    except NOT_COMPOSED as error:
        fail(program, explain(configuration, parsed.overrides, error))
    except OSError as error:
        if sweeps.STARTED:
            raise
        fail(program, disk_fault(error), DISK)  # the folder of a sweep
    except SystemExit as end:
        if parsed.cfg and end.code == 1:  # Hydra said which package is unknown
            raise SystemExit(BAD_INPUT) from end
        raise
    sentence, status = sweeps.outcome()
    if status:
        fail(program, sentence, status)


def fail(program: str, message: str, status: int = BAD_INPUT) -> NoReturn:
    """Print ``message`` to stderr and leave."""
    print(f"{program}: " + "\n".join(map(shown, message.split("\n"))), file=sys.stderr)
    raise SystemExit(status)
