"""What the documents promise a newcomer: the README's program, links that lead somewhere, pages that stay short."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import reconstruct

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "assets").rglob("*.md")]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NAMED_FILE = re.compile(r"`((?:particledaps|configs|docs|tools|tests|benchmarks|commands_gpu|assets)/[\w./-]*\w)`")


def test_its_program_gives_the_losses_of_the_application_from_any_folder(tmp_path):
    """In a process of its own, where the checkout is found as an installed package is: through the path."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    small = program.replace("edm_path(30, ", "edm_path(2, ").replace(
        'ChainSettings("hmc", 30, ', 'ChainSettings("hmc", 2, '
    )
    assert small.count("(2, ") == 2 and small.count('"hmc", 2') == 1
    (tmp_path / "program.py").write_text(small)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "program.py"]
    out = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    small = ("sampler.annealing.num_steps=2", "sampler.mcmc.num_steps=2", "device=cpu", "save_trajectory=false")
    reconstruct("data.start_id=1", "data.end_id=2", f"save_dir={tmp_path}", "name=same", *small)
    metrics = json.loads((tmp_path / "same" / "metrics.json").read_text())
    assert json.loads(out) == pytest.approx(metrics["measurement"]["per_image"][0]["loss"], rel=1e-3)
    assert (tmp_path / "particles.png").stat().st_size > 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = [t for t in LINK.findall(page.read_text()) if not t.startswith(("http", "mailto"))]
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    named = [n for n in NAMED_FILE.findall(page.read_text()) if "NAME" not in n and "expN" not in n]
    optional = ("assets/dogs64", "assets/prior")  # examples
    assert [n for n in named if not n.startswith(optional) and not (ROOT / n).exists()] == []


def test_pages_for_newcomers_stay_short():
    for name in ("README.md", "PROJECT.md"):
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) <= 120 and all(len(line) <= 120 for line in lines if not line.startswith("|")), name
