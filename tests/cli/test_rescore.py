import json

import pytest

from particledaps.checks import SettingsError
from tools.rescore import rescore


def test_scores_come_back_from_the_floats(tiny_run):
    tiny_run("data.end_id=2")
    path = tiny_run.folder / "metrics.json"
    before = json.loads(path.read_text())
    record_path = tiny_run.folder / "records" / "00001.json"
    record = json.loads(record_path.read_text())
    record["metrics"]["psnr"] = [0.0 for _ in record["metrics"]["psnr"]]
    record["selected"]["psnr"] = 0.0
    del record["checksum"]  # as before records had one: with it this would be a damaged record
    record_path.write_text(json.dumps(record))
    assert rescore(tiny_run.folder) == 2
    after = json.loads(path.read_text())
    for key in ("psnr", "psnr_aligned", "ssim", "modes", "selection", "measurement"):
        assert after[key] == before[key]


def test_cut_floats_leave_one_image_its_scores(tiny_run, capsys):
    tiny_run("data.end_id=2")
    before = json.loads((tiny_run.folder / "metrics.json").read_text())
    path = tiny_run.folder / "floats" / "00000.npz"
    path.write_bytes(path.read_bytes()[:-50])
    assert rescore(tiny_run.folder) == 1
    assert f"image 0 keeps its scores: {path} is not a readable .npz file" in capsys.readouterr().out
    assert json.loads((tiny_run.folder / "metrics.json").read_text())["psnr"] == before["psnr"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="holds no run"):
        rescore(tmp_path)
