"""docs/records.md names every key of metrics.json, and no other."""

import json
import re
import sys
from pathlib import Path

import pytest
from tiny import QUICK, image_folder, no_lpips, no_sheets, reconstruct, tiny_prior  # noqa: F401 (fixtures)

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "records.md").read_text()
FREE = ("metadata.hyperparameters", "metadata.conventions.compat", "metadata.versions")
"""Maps whose keys are explained elsewhere (docs/keys.md) or by themselves."""
ELSEWHERE = {
    "vram.<phase>_peak_mb": "needs CUDA",
}
HOOK = """
from sampler import Hook

class Count(Hook):
    def after_mcmc(self, state, info):
        info.add("levels", step=state.step)
        return state
"""
EVERY_HOOK = (
    "num_samples=4",
    "repulsion_scale=0.1",
    "repulsion_features=latent",
    "repulsion_log=true",
    "pruning_step=700",
    "pruning_keep=3",
    "pruning_branch=5",
    "symmetry_moves=[flip,channels]",
    "symmetry_every=1",
    "symmetry_sigma_max=20",
    "restart_rounds=1",
    "restart_lineages=1",
    "restart_children=1",
    "restart_sigmas=[0.5]",
    "restart_polish=2",
    "optimization_step=400",
    "optimization_prior_sigma=0.1",
    "optimization_max_iters=2",
    "selection_rule=posterior",
)


def collapsed(name):
    """Names that depend on the run, as the page writes them."""
    name = re.sub(r"^timing\.phases\.\w+", "timing.phases.<phase>", name)
    name = re.sub(r"^vram\.\w+_peak_mb", "vram.<phase>_peak_mb", name)
    name = re.sub(r"^(psnr|ssim)(_aligned|_channel_aligned)?(?=\.|$)", "<metric>", name)
    return re.sub(r"^(hooks\[\]\.rows|hooks)\.\w+.*", r"\1.<Name>", name)


def keys(value, prefix=""):
    """Every dotted key, ``[]`` for the entries of a list."""
    if prefix in FREE:
        yield prefix
    elif isinstance(value, dict):
        if not value and prefix:
            yield prefix
        for name, inner in value.items():
            yield from keys(inner, f"{prefix}.{name}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        for entry in value:
            yield from keys(entry, f"{prefix}[]")
    else:
        yield prefix


@pytest.fixture(scope="module")
def files(tiny_prior, image_folder, tmp_path_factory):  # noqa: F811
    """``metrics.json`` of runs that between them leave everything behind."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "page_hook.py").write_text(HOOK)
    sys.path.insert(0, str(folder))
    model = ("model=embedded", f"model.path={tiny_prior}", *QUICK, f"save_dir={folder}", "save_trajectory=false")
    images = ("data=folder", f"data.dir={image_folder}", "data.end_id=1")
    lineages = ("restart_rounds=1", "restart_lineages=2", "restart_agreement=10", "restart_sigmas=[0.5]")
    runs = {
        "plain": images,
        "hooks": (*images, *EVERY_HOOK),
        "late": (
            *images,
            "resample_sigma=1",
            "resample_sigma_min=0",
            "sampler.annealing.num_steps=8",
            "start=hio",
            "start_iterations=2",
            "start_restarts=4",
        ),
        "lineages": (*images, *lineages, "hooks=[page_hook:Count]"),
        "pixels": (*images, "sampler.mcmc.space=pixel", "sampler.mcmc.covariance=measured"),
        "given": (f"data.measurement={folder}/plain/floats/00000.npz",),
    }
    try:
        for name, own in runs.items():
            outcome = reconstruct(*model, *own, f"name={name}")
            assert outcome.status == 0, (name, outcome.err)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("page_hook", None)
    return {name: folder / name / "metrics.json" for name in runs}


def found(files):
    return {collapsed(key) for path in files.values() for key in keys(json.loads(path.read_text()))}


def documented():
    return set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.M))


def test_every_key_is_documented(files):
    named = documented()
    unnamed = found(files) - named
    assert sorted(key for key in unnamed if not any(n.startswith((f"{key}[]", f"{key}.")) for n in named)) == []


def test_every_documented_key_occurs(files):
    here = found(files) | set(ELSEWHERE)
    parents = {key.rsplit(".", 1)[0].removesuffix("[]") for key in here}
    assert sorted(documented() - here - parents) == []
    assert len(documented()) > 100


def test_the_example_of_the_page_runs(files, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(files["plain"].parent.parent)
    exec(program.replace("results/demo", "plain"), {})
    assert re.search(r"image 0: -?\d+\.\d\d dB", capsys.readouterr().out)
