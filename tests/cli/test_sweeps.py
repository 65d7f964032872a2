"""Sweeps and the other options of Hydra's command line: one sentence for what is wrong, no member lost, no litter."""

import metrics_schema
import pytest
from tiny import command

import posterior_sample
from particledaps.checks import SettingsError
from particledaps.settings.start_up import Terminated

WRONG = {
    "-m num_sampels=1,2": "num_sampels: unknown key; did you mean num_samples?",
    "-m seed=1,abc": "seed=abc: Value 'abc' of type 'str' could not be converted to Integer",
    "-m name=a,b seed=2,1,abc": "seed=abc: Value 'abc'",
    "-m model=cats64,cat": "model=cat: allowed are cats64, cats64px, custom",
    "-m model=glob(x*)": "model=glob(x*): allowed are cats64",
    "-m seed=interval(1,2)": "seed=interval(1,2): BasicSweeper does not support",
    "-m seed=[": "seed=[: no viable alternative",
    "-m seed=1,2 name=${nothing}": "name: Interpolation key 'nothing' not found",
    "-m name=a,${nothing}": "name: Interpolation key 'nothing' not found",
    "-m save_dir=": "save_dir='': name the folder",
    "-m data.dir=???": "data.dir is not set: add data.dir=VALUE",
    "-m demo": "'demo' is no override",
    "-m hydra.sweep.dirr=x seed=1,2": "hydra.sweep.dirr=x: Key 'dirr' not in 'SweepDir'",
    "-m hydra/launcher=nope seed=1,2": "hydra/launcher=nope: In 'hydra/config': Could not find 'hydra/launcher/nope'",
    "hydra.mode=MULTIRUN num_sampels=1,2": "num_sampels: unknown key",
    "seed=1,2": "seed=1,2: Ambiguous value for argument 'seed=1,2'; several values take -m",
    "--cfg job num_sampels=1": "num_sampels: unknown key",
    "--cfg job --resolve name=${nothing}": "name: Interpolation key 'nothing' not found",
    "--cfg job -p nowhere": "--package nowhere: there is no such part",
    "--cfg jobs": "argument --cfg/-c: invalid choice: 'jobs' (choose from 'job', 'hydra', 'all')",
    "--cfg": "argument --cfg/-c: expected one argument",
    "--confg job": "--confg: unknown option; did you mean --cfg",
    "--config-name nope": "--config-name nope: there are config in",
    "--config-name train_prior": "--config-name train_prior: is the configuration of another program",
    "-cd nowhere": "nowhere: there is no such folder",
    "-cp nowhere": "nowhere: there is no such folder",
    "--info nope": "argument --info/-i: invalid choice: 'nope'",
    "--info config sede=3": "sede: unknown key; did you mean seed?",
    "--resolve": "--resolve: goes with --cfg or --help",
    "--package data": "--package: goes with --cfg",
    "--run -m seed=3": "--run and --multirun: only one of them at a time",
    "--cfg job -m": "--multirun and --cfg: only one of them at a time",
    "--experimental-rerun x": "--experimental-rerun: not offered",
    "--help num_sampels=3": "num_sampels: unknown key",
    "-seed=3": "-seed: unknown option; a key takes no dash: seed=3",
    "seed=3 --sweep": "--sweep: unknown option",
    "+model.options.file=a=b": "takes quotes: \"+model.options.file='a=b'\"",
}
RIGHT = {
    "--help": "Powered by Hydra",
    "-h seed=3": "Powered by Hydra",
    "--cfg job seed=7": "seed: 7",
    "seed=7 --cfg job save_dir=x": "save_dir: x",
    "--cfg job -p data": "kind: demo",
    "--cfg job data.dir=???": "dir: ???",
    "--hydra-help": "hydra/launcher",
    "--version": "Hydra 1.",
}


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The working directory of the command."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def members(monkeypatch, empty_folder):
    """Seeds and names of the members that ran; a seed below 0 is refused, others end as :data:`ENDS` says."""
    seen = []

    def reconstruct(settings, config):
        seen.append((settings.seed, settings.name))
        if settings.seed < 0:
            raise SettingsError(f"seed={settings.seed}: must be at least 0")
        if isinstance(end := ENDS.get(settings.seed, {}), dict):
            return end
        raise end

    monkeypatch.setattr(posterior_sample, "reconstruct", reconstruct)
    return seen


ENDS = {
    101: {0: ("failed", "out of memory")},
    103: {0: ("diverged", "every particle diverged")},
    130: KeyboardInterrupt(),
    143: Terminated(),
    999: ZeroDivisionError("a bug"),
}


def sample_command(line):
    return command("posterior_sample", *line.split())


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_said_before_anything_runs(members, empty_folder, line):
    outcome = sample_command(line)
    assert outcome.status == 2 and members == []
    assert outcome.err.startswith("posterior_sample.py: ") and outcome.err.count("\n") == 1
    assert WRONG[line] in outcome.err
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("line", RIGHT)
def test_other_options_work_as_before(members, empty_folder, line):
    outcome = sample_command(line)
    assert (outcome.status, outcome.err, members) == (0, "", [])
    assert RIGHT[line] in outcome.out
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("line", ["-m name=a,b seed=1", "name=a,b -m seed=1", "name=a,b seed=1 --multirun"])
def test_overrides_stand_on_either_side_of_an_option(members, line):
    assert sample_command(line).status == 0
    assert members == [(1, "a"), (1, "b")]


def test_names_may_lean_on_swept_keys(members):
    assert sample_command("-m seed=3,4 name=s_${seed}").status == 0
    assert members == [(3, "s_3"), (4, "s_4")]


@pytest.mark.parametrize(("bad", "status"), [(-1, 2), (101, 1), (103, 3)])
def test_a_bad_member_does_not_end_the_others(members, bad, status):
    outcome = sample_command(f"-m seed=3,{bad},4")
    assert [seed for seed, _ in members] == [3, bad, 4] and outcome.status == status
    assert outcome.err.splitlines()[-1] == (
        f"posterior_sample.py: 1 of 3 members of the sweep ended badly: seed={bad} (status {status})"
    )
    assert len(outcome.err.splitlines()) == 2


def test_the_worst_status_counts(members):
    outcome = sample_command("-m seed=101,103,-1,4")
    assert outcome.status == 3 and len(members) == 4
    assert "3 of 4 members" in outcome.err


def test_an_earlier_sweep_of_the_process_is_forgotten(members):
    assert sample_command("-m seed=-1").status == 2
    assert sample_command("-m seed=3,4").status == 0


@pytest.mark.parametrize(("seed", "word"), [(130, "interrupted"), (143, "terminated")])
def test_who_stops_a_member_stops_the_sweep(members, seed, word):
    outcome = sample_command(f"-m seed=-1,{seed},4")
    assert outcome.status == seed and len(members) == 2
    assert outcome.err.splitlines()[-1] == (
        f"posterior_sample.py: {word}; finished images are kept, the same command goes on"
    )


def test_a_bug_in_one_member_shows_after_the_others_have_run(members):
    with pytest.raises(ZeroDivisionError):
        sample_command("-m seed=3,999,4")
    assert len(members) == 3


@pytest.mark.parametrize(
    ("line", "places"),
    [
        ("-m seed=1,2 save_dir=out", {"out"}),
        ("-m save_dir=x,y", {"x"}),
        ("-m save_dir=it's,y", {"it's"}),
        ("-m seed=1,2", {"results"}),
        ("-m seed=1,2 hydra.sweep.dir=elsewhere", {"elsewhere"}),
    ],
)
def test_the_files_of_a_sweep_lie_under_save_dir(members, empty_folder, line, places):
    assert sample_command(line).status == 0
    files = {p.relative_to(empty_folder) for p in empty_folder.rglob("*") if p.is_file()}
    assert {p.parts[0] for p in files} == places and {p.name for p in files} == {"multirun.yaml"}
    assert all(p.parts[1] == "multirun" for p in files if p.parts[0] != "elsewhere")


def test_a_sweep_without_a_place_says_so(members, empty_folder):
    (empty_folder / "file").write_text("")
    outcome = sample_command("-m seed=1,2 save_dir=file")
    assert outcome.status == 4 and members == []
    assert outcome.err.startswith("posterior_sample.py: the disk refuses: ") and outcome.err.count("\n") == 1


def test_a_folder_of_configurations(members, tmp_path):
    more = tmp_path / "more"
    (more / "experiment").mkdir(parents=True)
    (more / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    (more / "my.yaml").write_text("defaults: [config, _self_]\nseed: 9\n")
    (more / "other.yaml").write_text("a: 1\n")
    (more / "broken.yaml").write_text("a: [1\n")
    assert sample_command(f"-cd {more} experiment=mine").status == 0
    assert sample_command(f"-cd {more} -cn my").status == 0
    assert sample_command(f"-cd {more} -m experiment=mine,ours").status == 0
    assert [seed for seed, _ in members] == [7, 9, 7, 42]
    for line, said in {
        "experiment=mien": "experiment=mien: allowed are exp0_baseline",
        "experiment=mine num_sampels=3": "num_sampels: unknown key",
        "-cn other": "--config-name other: must name the defaults of config.yaml",
        "-cn broken": "a configuration file cannot be read",
    }.items():
        outcome = sample_command(f"-cd {more} {line}")
        assert outcome.status == 2 and said in outcome.err and outcome.err.count("\n") == 1


def test_members_reconstruct_and_a_name_that_is_taken_is_refused(tiny_run, empty_folder):
    outcome = tiny_run.command("-m", "data.end_id=1", "seed=3,-1,4")
    assert outcome.status == 2
    refusals = outcome.err.splitlines()
    assert any("seed=-1: must be at least 0" in line for line in refusals)
    assert any("holds a run with another configuration (it differs in seed)" in line for line in refusals)
    assert "Traceback" not in outcome.err and "2 of 3 members" in refusals[-1]
    assert metrics_schema.load(tiny_run.folder / "metrics.json")["metadata"]["seed"] == 3
    assert list(empty_folder.iterdir()) == []


def test_a_training_is_checked_the_same_way(empty_folder):
    assert "images is not set" in command("train_prior", "-m", "seed=1,2").err
    outcome = command("train_prior", "-m", "images=x", "resolutoin=16,32")
    assert outcome.status == 2 and "did you mean resolution?" in outcome.err
    outcome = command("train_prior", "-m", "images=nowhere", "seed=1,2", "save_dir=t")
    assert outcome.status == 2 and "2 of 2 members of the sweep ended badly" in outcome.err
    assert command("train_prior", "--help").status == 0
    assert {p.name for p in empty_folder.iterdir()} == {"t"}
