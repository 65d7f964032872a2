"""docs/keys.md is what the dataclasses say, and says something of every key."""

import importlib.util
import re
from pathlib import Path

from particledaps.settings.command_line import all_keys, compose_config

ROOT = Path(__file__).resolve().parents[2]


def writer():
    spec = importlib.util.spec_from_file_location("write_keys", ROOT / "docs" / "write_keys.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says():
    assert (ROOT / "docs" / "keys.md").read_text() == writer().page(), "run python docs/write_keys.py"


def test_every_key_is_explained():
    rows = re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", (ROOT / "docs" / "keys.md").read_text(), re.M)
    explained = {key for key, meaning in rows if len(meaning) > 3}
    for program, more in (("config", []), ("generate", []), ("train_prior", ["images=x"])):
        keys = {k for k in all_keys(compose_config(program, more)) if not k.startswith("task.mcmc.")}
        inner = {k for k in keys if k.startswith("sampler.families.")}
        leaves = {k for k in keys - inner if not any(other.startswith(f"{k}.") for other in keys)}
        assert leaves - explained == set(), program
        assert len(leaves) > 15
