"""The options of Hydra's command line (``-m``, ``--cfg``, ``--config-name``, ...), with errors in one sentence."""

from __future__ import annotations

import difflib
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from particledaps.settings.configuration import CONFIG_DIR, CONFIGS, Configuration

MODES = {"run": "--run", "multirun": "--multirun", "cfg": "--cfg", "info": "--info", "shell_completion": "-sc"}


class OptionError(Exception):
    """The options cannot be used; the message is the sentence."""


def parse_options(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """Options as Hydra reads them, and the arguments in an order in which it finds all overrides.

    Raises:
        OptionError: an option is unknown or its value is not allowed.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise OptionError(_with_suggestion(parser, message))

    parser.error = refuse  # type: ignore[method-assign]  # Hydra made it, so it cannot be of a class of ours
    parsed = parser.parse_intermixed_args(arguments)
    _check_together(parsed)
    options = [a for a in arguments if a not in parsed.overrides]
    return parsed, [*parsed.overrides, *options]  # Hydra would not see overrides on both sides of an option


def configuration_of(parsed: Namespace, program: str) -> Configuration:
    """The configuration that the options name.

    Raises:
        OptionError: there is none.
    """
    folder = CONFIG_DIR if parsed.config_path is None else CONFIG_DIR.parent / parsed.config_path
    extra = None if parsed.config_dir is None else Path(parsed.config_dir).absolute()
    for option, path in (("--config-path", folder), ("--config-dir", extra)):
        if path is not None and not path.is_dir():
            raise OptionError(f"{option} {path}: there is no such folder")
    name = (parsed.config_name or program).removesuffix(".yaml")
    if name != program and name in CONFIGS:
        raise OptionError(f"--config-name {name}: is the configuration of another program")
    folders = [folder, *filter(None, [extra])]
    if not any((f / f"{name}.yaml").is_file() for f in folders):
        names = sorted({p.stem for f in folders for p in f.glob("*.yaml")} - (CONFIGS.keys() - {program}))
        raise OptionError(f"--config-name {name}: there are {', '.join(names) or 'none'} in {_listed(folders)}")
    return Configuration(program, name, folder, extra)


def composes_only(parsed: Namespace) -> bool:
    """Whether something is shown and nothing runs, so that values may still be missing."""
    return bool(parsed.help or parsed.cfg or parsed.info)


def is_sweep(parsed: Namespace) -> bool:
    """Whether several members are asked for."""
    return parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides


def _listed(folders: list[Path]) -> str:
    return " and ".join(map(str, folders))


def _check_together(parsed: Namespace) -> None:
    modes = [option for name, option in MODES.items() if getattr(parsed, name)]
    if parsed.experimental_rerun is not None:
        raise OptionError("--experimental-rerun: not offered; the command that was interrupted, given again, goes on")
    if len(modes) > 1:
        raise OptionError(f"{' and '.join(modes)}: only one of them at a time")
    if parsed.resolve and not (parsed.cfg or parsed.help):
        raise OptionError("--resolve: goes with --cfg or --help")
    if parsed.package is not None and not parsed.cfg:
        raise OptionError("--package: goes with --cfg")


def _with_suggestion(parser: ArgumentParser, message: str) -> str:
    """What argparse says, and the option that may have been meant."""
    head, _, rest = message.partition("unrecognized arguments: ")
    if head or not rest:
        return message
    option, equals, value = rest.split()[0].partition("=")
    if equals and not option.startswith("--"):
        return f"{option}: unknown option; a key takes no dash: {option.lstrip('-')}={value}"
    known = [o for o in parser._option_string_actions if o.startswith("--")]
    close = difflib.get_close_matches(option, known, n=2)
    return f"{option}: unknown option; " + (f"did you mean {' or '.join(close)}?" if close else "--help lists the keys")
