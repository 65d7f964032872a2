"""cards.yaml: read alike by awk and by Python, complete, and in step with the configurations."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from particledaps.priors import cards
from particledaps.priors.cards import CARDS, card_of_model, problem_with_file, read_cards
from particledaps.priors.prior import PriorError

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ["ldm_imagenet256", "ldm_ffhq256", "ffhq256", "imagenet256", "dino", "lpips", "nonlinear-blur"]
NAMES += ["test-imagenet", "test-ffhq"]
ENTRIES = yaml.safe_load(CARDS.read_text())


def download(*arguments, **variables):
    command = ["bash", str(ROOT / "download.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


def test_no_argument_prints_the_usage_with_every_name():
    process = download()
    assert process.returncode == 0 and process.stdout.startswith("usage: bash download.sh NAME")
    assert all(f"\n  {name} " in process.stdout for name in [*NAMES, "all"])
    assert download("--help").stdout == process.stdout


@pytest.mark.parametrize("wrong", ["ffhq", "*", "", "ffhq256 imagenet256", "--all"])
def test_an_unknown_name_lists_the_known_ones(wrong, tmp_path):
    process = download("ffhq256", wrong, PARTICLEDAPS_CACHE=str(tmp_path / "cache"))
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert f"'{wrong}' is unknown" in process.stderr and all(name in process.stderr.split() for name in NAMES)
    assert not (tmp_path / "cache").exists()


def test_the_script_and_python_read_the_same():
    function = re.search(r"^table\(\) \{.*?\n\}\n", (ROOT / "download.sh").read_text(), re.S | re.M)[0]
    command = ["bash", "-c", f'CARDS="$1"\n{function}table', "bash", str(CARDS)]
    table = subprocess.run(command, capture_output=True, text=True).stdout
    plain = {True: "yes", False: "no"}
    entries = [(name, key, value) for name, entry in ENTRIES.items() for key, value in entry.items()]
    expected = [(n, k, plain[v] if isinstance(v, bool) else str(v)) for n, k, v in entries if v is not None]
    assert [tuple(line.split("\t")) for line in table.splitlines()] == expected


def test_every_target_that_a_file_names_is_one():
    shown = [p for p in ROOT.glob("*") if p.is_file()]
    rooms = [p for p in ROOT.glob("*") if p.is_dir() and not p.name.startswith(".")]
    own = [p for p in rooms if p.name not in ("tests", "checkpoints", "dataset", "results", "trainings")]
    shown += [p for room in own for p in room.rglob("*")]
    known = {card.download for card in read_cards().values()} | {"all"}
    named = {}
    for path in shown:
        if path.suffix in (".py", ".md", ".yaml", ".sh"):
            text = re.sub(r'"\n\s*f?"', "", path.read_text())  # a message over two lines
            for words in re.findall(r"bash download\.sh((?: [A-Za-z][\w-]*)+)", text):
                named |= dict.fromkeys(set(words.split()) - {"NAME"}, path)
    assert {"lpips", "nonlinear-blur"} <= set(named)
    assert {word: path for word, path in named.items() if word not in known} == {}


def test_the_names_of_the_script_are_those_of_the_cards():
    assert set(NAMES) <= {card.download for card in read_cards().values()}


@pytest.mark.parametrize("card", read_cards().values(), ids=lambda card: card.name)
def test_every_card_can_be_used(card):
    assert card.title and card.licence and card.verified and card.megabytes > 0
    assert (card.download is None) == (card.url is None) == (card.file is None) == (card.hub is not None)
    if card.url is not None:
        assert re.fullmatch(r"https://\S+", card.url) and "sha256" in ENTRIES[card.name]
        assert (card.fetched_as is not None) == (card.url.endswith(".zip") or card.place == "dataset")
    if card.sha256 is not None:
        assert re.fullmatch("[0-9a-f]{64}", card.sha256)
    if card.place == "torch_hub" and (prefix := re.search(r"-([0-9a-f]{8})\.pth$", card.file)):
        assert card.sha256.startswith(prefix[1])
    if card.becomes is not None:
        assert card.model and card.schedule and card.prediction and card.classes and card.range == "-1 1"


def test_the_schedules_are_those_that_the_networks_learnt():
    grid = read_cards()["ldm_ffhq256"].sigmas()
    assert len(grid) == 1000 and grid[0].item() == pytest.approx(0.0388, abs=1e-4)
    assert grid[-1].item() == pytest.approx(83.82, abs=1e-2)
    assert read_cards()["ffhq256"].sigmas()[-1].item() == pytest.approx(157.4, abs=0.1)


def test_the_configurations_read_what_is_fetched():
    for card in read_cards().values():
        config = ROOT / "configs" / "model" / f"{card.model}.yaml"
        if card.model is not None and config.exists():
            path = yaml.safe_load(config.read_text())["path"]
            assert path in card.model_paths()
            assert card_of_model(card.model) is card
    for name in ("test-ffhq", "test-imagenet"):
        assert (
            ROOT / yaml.safe_load((ROOT / f"configs/data/{name}.yaml").read_text())["dir"] == read_cards()[name].path()
        )
    assert card_of_model("cats64") is None


def test_weights_lie_where_the_code_looks(monkeypatch, tmp_path):
    from particledaps.evaluation.metrics import lpips_files

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    wanted = [card.path() for card in read_cards().values() if card.download == "lpips"]
    assert wanted == lpips_files()


@pytest.mark.parametrize(
    "text, word",
    [
        ("a: {licence: x}", "title"),
        ("a: {title: x, licence: x, megabytes: 1, colour: red}", "colour"),
        ("a: {title: x, licence: x, megabytes: 1, place: moon}", "place=moon"),
        ("a: {title: x, licence: x, megabytes: 1, schedule: cosine}", "schedule=cosine"),
        ("- a", "damaged"),
        ("a: [", "damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, word):
    path = tmp_path / "cards.yaml"
    path.write_text(text)
    with pytest.raises(PriorError, match=word):
        read_cards(path)


def test_a_file_is_held_against_its_card_and_its_first_download(checkout, web, monkeypatch):
    web.files["net.pt"] = b"weights"
    checkout.card("net", sha256="null")
    checkout("net")
    (card,) = read_cards(checkout.root / "particledaps" / "priors" / "cards.yaml").values()
    monkeypatch.setattr(cards, "ROOT", checkout.root)
    assert card.path() == Path(checkout.cache / "net.pt") and problem_with_file(card) is None
    for content, word in ((b"w3ights", "sha256"), (b"<!DOCTYPE html>", "web page")):
        card.path().write_bytes(content)
        assert word in problem_with_file(card)


def test_a_linked_file_is_held_against_the_record_of_its_cache(checkout, web, monkeypatch, tmp_path):
    web.files["net.pt"] = b"weights"
    checkout.card("net")
    checkout("net", PARTICLEDAPS_CACHE=tmp_path / "cache")
    (card,) = read_cards(checkout.root / "particledaps" / "priors" / "cards.yaml").values()
    monkeypatch.setattr(cards, "ROOT", checkout.root)
    assert card.path().is_symlink() and problem_with_file(card) is None
    (tmp_path / "cache" / "net.pt").write_bytes(b"other")
    assert "sha256" in problem_with_file(card)
