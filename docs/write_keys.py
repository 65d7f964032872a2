"""Write docs/keys.md, the reference of every key, from the dataclasses that hold them: python docs/write_keys.py."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from omegaconf import OmegaConf  # noqa: E402

import generate  # noqa: E402
import posterior_sample  # noqa: E402, F401  (registers the configuration)
import run_settings  # noqa: E402
import train_prior  # noqa: E402, F401
from particledaps.settings.command_line import CONFIG_DIR, compose_config  # noqa: E402
from particledaps.settings.hook_keys import flat_name  # noqa: E402
from particledaps.settings.schema import ChainConfig  # noqa: E402
from particledaps.settings.tasks import OPERATORS, RESERVED  # noqa: E402
from particledaps.training.settings import TrainingSettings  # noqa: E402

PAGE = ROOT / "docs" / "keys.md"
PROGRAMS = {"config": run_settings.RunSettings, "generate": generate.GenerateSettings, "train_prior": TrainingSettings}
ATTRIBUTE = re.compile(r"^(\w+):\s+(.*)$")
HEAD = """# Keys

Every key of the three programs: type, default, what it may be and what it means. Defaults are those of a run without
arguments. A key is written `key=value` on the command line; a group takes the name of a file in `configs/`
(`sampler=latent_daps_hmc`) and sets several keys at once. Lists are written `[1,2]`, null is `null`.

This page is made from the code by `python docs/write_keys.py`; a test compares the two.
"""


def described(kind: Any, heading: str = "Attributes") -> dict[str, str]:
    """The text of each entry under a heading of a docstring."""
    lines = (inspect.getdoc(kind) or "").partition(f"{heading}:\n")[2].splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(" "):
            break
        entry = ATTRIBUTE.match(line.removeprefix("    "))
        if entry:
            name, text = entry.groups()
            found[name] = text
        elif line.strip():
            found[name] += " " + line.strip().removeprefix("* ")
    return found


def plain(text: str) -> str:
    """Markdown of a docstring's reST, safe in a table."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`").replace("None:", "null:")
    return re.sub(r" +", " ", text).replace("|", r"\|")


def type_name(hint: Any) -> str:
    """A type as a reader says it."""
    if get_origin(hint) in (Union, UnionType):
        members = get_args(hint)
        named = [type_name(a) for a in members if a is not type(None) and not (a is int and float in members)]
        return " or ".join(named) + (", or null" if type(None) in members else "")
    if get_origin(hint) in (list, tuple):
        return f"list of {type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Any": "any"}.get(
        getattr(hint, "__name__", str(hint)), getattr(hint, "__name__", str(hint))
    )


def written(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`" if value is not None else "`null`"
    if isinstance(value, (list, tuple)):
        return f"`[{','.join(map(str, value))}]`"
    return f"`{value}`" if value != "" else "`''`"


def allowed(field: Field) -> str:
    """What a hook's key may be, from the facts beside it."""
    facts = field.metadata
    if facts.get("words"):
        return ", ".join(f"`{word}`" for word in facts["words"])
    if facts.get("low") is None:
        return ""
    low = f"{'more than' if facts['open_low'] else 'at least'} {facts['low']:g}"
    return low if facts["high"] == math.inf else f"{low}, at most {facts['high']:g}"


def table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """A Markdown table of keys."""
    return ["| key | type | default | meaning |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def rows(prefix: str, kind: type, defaults: Any) -> Iterator[tuple[str, str, str, str]]:
    """A row a key of one dataclass, without its parts."""
    hints, texts = get_type_hints(kind), described(kind)
    for field in fields(kind):
        if field.name in texts and not is_dataclass(hints[field.name]):
            default = getattr(defaults, field.name)
            value = ("in files" if default else "`{}`") if isinstance(default, dict) else written(default)
            yield (f"`{prefix}{field.name}`", type_name(hints[field.name]), value, plain(texts[field.name]))


def parts(prefix: str, kind: type, defaults: Any) -> Iterator[str]:
    """Headings and tables of a dataclass and of the dataclasses in it."""
    hints = get_type_hints(kind)
    own = list(rows(prefix, kind, defaults))
    if own:
        yield f"## `{prefix.removesuffix('.') or 'top level'}`"
        yield ""
        yield plain(inspect.getdoc(kind).partition("\n\nAttributes")[0].replace("\n", " "))
        yield ""
        yield from table(own)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from parts(f"{prefix}{field.name}.", hints[field.name], getattr(defaults, field.name))


def hook_tables() -> Iterator[str]:
    """A table of each hook's keys."""
    for prefix, module in run_settings.KEYED.items():
        hints, texts = get_type_hints(module.Settings), described(module.Settings)
        yield f"## `{prefix}_*`: {Path(module.__file__).relative_to(ROOT)}"
        yield ""
        yield plain(inspect.getdoc(module).partition("\n\n")[0].replace("\n", " "))
        yield plain(inspect.getdoc(module.Settings).partition("\n\n")[0].replace("\n", " "))
        yield ""
        found = []
        for field in fields(module.Settings):
            limits = allowed(field)
            kind = type_name(hints[field.name]) + (f"; {limits}" if limits else "")
            found.append((f"`{flat_name(prefix, field)}`", kind, written(field.default), plain(texts[field.name])))
        yield from table(found)


def option_tables() -> Iterator[str]:
    """The keys of ``task.options``, an operator each."""
    yield "## `task.options`"
    yield ""
    yield "Parameters of the operator that the task names; `phase_retrieval` has none."
    yield ""
    yield "| task | option | default | meaning |"
    yield "|---|---|---|---|"
    for kind, factory in OPERATORS.items():
        texts, parameters = described(factory, "Args"), inspect.signature(factory).parameters.values()
        for own in (p for p in parameters if p.name not in ("noise_sigma", *RESERVED.get(kind, ()))):
            yield f"| `{kind}` | `{own.name}` | {written(own.default)} | {plain(texts.get(own.name, ''))} |"
    yield ""


def family_table(families: dict[str, Any]) -> Iterator[str]:
    """What ``sampler=auto`` takes for each family of priors."""
    yield "## `sampler.families`"
    yield ""
    yield "What a null above becomes, by `model.family`; what stands nowhere is taken from `task.mcmc.<model.family>`"
    yield "in `configs/task/`, or for `sampler.mcmc.curvature_limit` stays off."
    yield ""
    yield "| family | `annealing` | `ode` | `mcmc` |"
    yield "|---|---|---|---|"
    for name, family in families.items():
        values = (", ".join(_set_values(part)) for part in (family.annealing, family.ode, family.mcmc))
        yield f"| `{name}` | {' | '.join(values)} |"
    yield ""


def _set_values(part: Any) -> Iterator[str]:
    defaults = type(part)()
    for field in fields(part):
        value = getattr(part, field.name)
        if value is not None and (value != getattr(defaults, field.name) or not isinstance(part, ChainConfig)):
            yield f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}"


def group_table() -> Iterator[str]:
    """The configuration groups and their options."""
    yield "## Groups"
    yield ""
    yield "| group | options |"
    yield "|---|---|"
    for folder in sorted(p for p in CONFIG_DIR.iterdir() if p.is_dir() and p.name != "experiment_base"):
        yield f"| `{folder.name}=` | {', '.join(f'`{p.stem}`' for p in sorted(folder.glob('*.yaml')))} |"
    yield ""


def page() -> str:
    """The text of docs/keys.md."""
    lines = [HEAD, "# posterior_sample.py", ""]
    lines += group_table()
    run = OmegaConf.to_object(compose_config("config", []))
    lines += parts("", run_settings.RunSettings, run)
    lines += family_table(run.sampler.families)
    lines += option_tables()
    lines += hook_tables()
    lines += ["# generate.py", "", "Beside these: `model.*` and `compat.*` as above.", ""]
    own = OmegaConf.to_object(compose_config("generate", []))
    lines += table(list(rows("", generate.GenerateSettings, own)))
    lines += ["# train_prior.py", ""]
    training = OmegaConf.to_object(compose_config("train_prior", ["images=IMAGES"]))
    lines += parts("", TrainingSettings, training)
    return "\n".join(lines).replace("`IMAGES`", "(needed)").rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
