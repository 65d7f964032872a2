"""Imports run one way, from the verbs down to the mathematics."""

import ast
import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"streams", "files", "checks", "names", "checksums", "checkout", "diffusion", "operators"},
    {"priors", "data"},
    {"paths", "evaluation"},
    {"settings", "doctor"},
    {"particles", "reports"},
    {"runs"},
    {"training"},
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
HOOKS = ("repulsion", "pruning", "resample_opt", "restarts", "symmetry", "resampling")
TORCH_ONLY = ("diffusion", "operators")


def imports(path):
    """Modules that a file imports when it runs; what only a type checker reads does not count."""
    tree = ast.parse(path.read_text())
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    left_out = {id(inner) for block in for_types for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "particledaps":
            yield from (f"particledaps.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def library():
    for path in sorted(ROOT.glob("particledaps/**/*.py")):
        room = path.relative_to(ROOT / "particledaps").parts[0].removesuffix(".py")
        if room != "__init__":
            yield path, room


def test_every_room_has_its_place():
    assert {room for _, room in library()} <= set(RANK)


def test_the_library_knows_neither_loop_nor_hook_nor_verb():
    own = {path.stem for path in ROOT.glob("*.py")}
    wrong = [(str(path), name) for path, _ in library() for name in imports(path) if name.split(".")[0] in own]
    assert wrong == [] and {"sampler", "plan", "posterior_sample", *HOOKS} <= own


def test_rooms_import_downwards_only():
    pairs = [(path, room, name) for path, room in library() for name in imports(path)]
    ours = [(p, r, name.split(".")[1]) for p, r, name in pairs if name.startswith("particledaps.")]
    assert [(str(p), other) for p, room, other in ours if RANK[other] > RANK[room]] == []
    assert len(ours) > 300


def test_mathematics_imports_torch_only():
    allowed = {"torch", "particledaps"}
    own = [(path, name) for path, room in library() if room in TORCH_ONLY for name in imports(path)]
    further = {name.split(".")[0] for _, name in own} - allowed
    import sys

    assert further <= set(sys.stdlib_module_names) | {"deepinv"}


def test_hooks_do_not_know_each_other():
    for hook in HOOKS:
        found = {name.split(".")[0] for name in imports(ROOT / f"{hook}.py")}
        assert not found & {*HOOKS, "plan", "sampler", "session"}, hook


ROLE = re.compile(r":(?:mod|class|func|data|meth|attr):`~?([a-zA-Z_][\w]*(?:\.\w+)+)`")
REFERENCES = sorted(
    {
        name
        for path in ROOT.glob("**/*.py")
        if not {".venv", "tests"} & {*path.relative_to(ROOT).parts}
        for name in ROLE.findall(path.read_text())
    }
)


@pytest.mark.parametrize("name", REFERENCES)
def test_every_reference_of_a_docstring_exists(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        reduce(getattr, parts[cut:], module)
        return
    raise AssertionError(f"{name}: there is no such module")


def test_there_are_references():
    assert len(REFERENCES) > 30


def test_a_name_means_one_thing():
    """Classes of one name; a hook's ``Settings`` is the one that each hook has."""
    sources = [p for p in ROOT.glob("**/*.py") if not {".venv", "tests", "results"} & {*p.relative_to(ROOT).parts}]
    trees = [ast.parse(path.read_text()) for path in sources]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {name for name in names if names.count(name) > 1} == {"Settings"}
    assert len(names) > 150


def test_no_line_assigns_three_values_at_once():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("particledaps/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                targets = [len(t.elts) for t in node.targets if isinstance(t, ast.Tuple)]
                assert not targets or max(targets) < 3, f"{path}:{node.lineno}"
