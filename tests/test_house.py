"""Imports run one way, from the verbs down to the mathematics."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"streams", "files", "checks", "names", "checksums", "diffusion", "operators"},
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
