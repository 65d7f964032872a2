import os
import time

import pytest

from particledaps.checks import SettingsError
from particledaps.files import links_below, remove_abandoned, replacing, write_atomically
from particledaps.settings.stored_config import dump_config, read_config


def test_every_writer_has_a_temporary_file_of_its_own(tmp_path):
    target = tmp_path / "a.png"
    with replacing(target) as one, replacing(target) as other:
        assert one != other and one.suffix == other.suffix == ".png"
        one.write_text("one"), other.write_text("other")
    assert target.read_text() == "one"  # the outer block ended last
    assert os.listdir(tmp_path) == ["a.png"]


def test_what_fails_leaves_nothing_behind(tmp_path):
    write_atomically(tmp_path / "a.json", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.json") as path:
        path.write_text("half")
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.json").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "a.json").is_symlink()


def test_a_folder_steps_aside_with_what_is_in_it(tmp_path):
    (tmp_path / "a.json").mkdir()
    (tmp_path / "a.json" / "precious").write_text("mine")
    write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    (aside,) = tmp_path.glob("a.json.*.aside")
    assert (aside / "precious").read_text() == "mine"


def test_links_are_found_at_any_depth_and_not_entered(tmp_path):
    (tmp_path / "run" / "floats").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "inner").symlink_to(tmp_path)
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "floats" / "0.npz").symlink_to(tmp_path / "nothing")
    names = [p.relative_to(tmp_path / "run").as_posix() for p in links_below(tmp_path / "run")]
    assert names == ["floats/0.npz", "samples"]


def test_temporary_files_of_killed_processes_go_away(tmp_path):
    with replacing(tmp_path / "a.json") as path:
        path.write_text("")
        old = tmp_path / path.name.replace(".tmp", "0.tmp")
        old.write_text("")
        os.utime(old, (1, 1))
        remove_abandoned(tmp_path, time.time() - 300)
        assert path.exists() and not old.exists()


def alias_bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(["data: {}", *lines])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (alias_bomb(), "unfolds to more than 100,000 values"),
        ("data: " + "[" * 3000 + "]" * 3000, "not the configuration of a run"),
        ("data: {}\n" + "#" * 1_000_001, "more than 1,000,000 bytes"),
        ("- 1", "no group data"),
        ("\xff", "no group data"),
        ("a: [", "not the configuration of a run"),
        ("!!python/object/apply:os.system [true]", "not the configuration of a run"),
    ],
    ids=["alias bomb", "deep", "long", "list", "text", "broken", "code"],
)
def test_a_stored_configuration_may_hold_anything(tmp_path, text, reason):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    started = time.perf_counter()
    with pytest.raises(SettingsError, match=reason):
        read_config(path)
    assert time.perf_counter() - started < 5


def test_equal_parts_are_written_out(tmp_path):
    shared = {"k": [1, 2]}
    (tmp_path / "config.yaml").write_text(dump_config({"data": shared, "b": shared}))
    assert "&" not in (tmp_path / "config.yaml").read_text()
    assert read_config(tmp_path / "config.yaml") == {"data": shared, "b": shared}
