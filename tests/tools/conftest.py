import json
from itertools import count

import pytest

from tools.parse_metrics import main

NUMBERS = count()


@pytest.fixture
def write(tmp_path):
    """Writes a run folder; returns its path as text."""

    def written(metrics, folder=None):
        path = tmp_path / (folder or f"run{next(NUMBERS)}")
        path.mkdir()
        (path / "metrics.json").write_text(json.dumps(metrics))
        return str(path)

    return written


@pytest.fixture
def call(capsys):
    """Runs the tool; returns (stdout, stderr)."""

    def called(*arguments):
        capsys.readouterr()
        main([str(a) for a in arguments])
        return capsys.readouterr()

    return called


@pytest.fixture
def refused(capsys):
    """Runs the tool on bad input; returns its one sentence."""

    def called(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("parse_metrics.py: ") and "Traceback" not in err
        return err

    return called
