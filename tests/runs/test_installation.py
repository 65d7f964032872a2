import shutil
from collections import namedtuple
from importlib import metadata

import pytest

from particledaps.doctor import installation
from particledaps.doctor.installation import (
    NOTE,
    OK,
    PROBLEM,
    disk_finding,
    package_findings,
    python_finding,
    requirements,
)

Usage = namedtuple("Usage", "total used free")


def test_requirements_are_pinned_versions(tmp_path):
    (tmp_path / "r.txt").write_text("torch==2.12.1\n# comment==1\nhydra-core==1.3.8\n")
    assert requirements(tmp_path / "r.txt") == {"torch": "2.12.1", "hydra-core": "1.3.8"}


def test_packages_missing_other_and_as_wanted(monkeypatch):
    installed = {"torch": "2.12.1+cu130", "numpy": "2.0"}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(installation.metadata, "version", version)
    findings = package_findings({"torch": "2.12.1", "numpy": "2.4.6", "hydra-core": "1.3.8", "ruff": "0.17.5"})
    assert [f.state for f in findings] == [OK, PROBLEM, NOTE, NOTE]
    assert findings[0].text.startswith("1 of 4") and "hydra-core==1.3.8" in findings[1].remedy
    assert "numpy 2.0 (tested: 2.4.6)" in findings[3].text


@pytest.mark.parametrize("version, state", [((3, 10), PROBLEM), ((3, 11), OK), ((4, 0), OK)])
def test_an_old_python_is_a_problem(version, state):
    assert python_finding(version).state == state


@pytest.mark.parametrize("free, state", [(1e11, OK), (1e9, NOTE), (1e8, PROBLEM)])
def test_the_disk_of_a_folder_that_is_not_there_yet(monkeypatch, tmp_path, free, state):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(0, 0, free))
    assert disk_finding(tmp_path / "a" / "b").state == state and asked == [tmp_path]


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(installation.os, "access", lambda path, mode: False)
    assert disk_finding(tmp_path / "a").state == PROBLEM
