"""download.sh against a local server: what arrives, what is refused, and that nothing half-written is left."""

import hashlib
import io
import os
import shutil
import subprocess
import zipfile

import pytest

CONTENT = bytes(range(256)) * 40


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def archive(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def refused(process, *words, status=1):
    """The run ended with ``status`` and one sentence that holds ``words``; no shell error among it."""
    assert process.returncode == status, process
    last = process.stderr.strip().splitlines()[-1]
    assert all(line.startswith("download.sh: ") for line in process.stderr.strip().splitlines()), process.stderr
    assert all(str(word) in process.stderr for word in words), process.stderr
    return last


def test_a_file_arrives_with_its_checksum(checkout, web):
    web.files["net.pt"] = CONTENT
    checkout.card("net", sha256=sha256(CONTENT), bytes=len(CONTENT))
    process = checkout("net")
    assert process.returncode == 0 and process.stderr == ""
    assert (checkout.cache / "net.pt").read_bytes() == CONTENT
    assert checkout.left() == ["checksums.txt", "net.pt"]
    assert subprocess.run(["sha256sum", "--check", "checksums.txt"], cwd=checkout.cache).returncode == 0


def test_the_plan_comes_before_the_first_connection(checkout):
    checkout.card("net", licence="CC BY-NC 4.0: no sale", megabytes=2212, url="https://127.0.0.1:9/net.pt")
    process = checkout("net")
    assert "CC BY-NC 4.0: no sale" in process.stdout and "2.2 GB" in process.stdout
    refused(process, "no connection to 127.0.0.1:9")


def test_offline_leaves_nothing_behind(checkout):
    checkout.card("net", url="https://127.0.0.1:9/net.pt")
    checkout.card("other", url="https://127.0.0.1:9/other.pt")
    process = checkout("all")
    refused(process, "no connection to 127.0.0.1:9", "run the same command again")
    assert checkout.left() == [] and "other: fetching" not in process.stdout


def test_a_file_that_is_there_is_checked_and_not_fetched(checkout, web):
    web.files["net.pt"] = CONTENT
    checkout.card("net")
    assert checkout("net").returncode == 0
    process = checkout("net")
    assert process.returncode == 0 and "is there, checksum agrees" in process.stdout
    assert web.asked == [("net.pt", 0)]


def test_the_first_download_is_recorded_and_checked_ever_after(checkout, web):
    web.files["net.pt"] = CONTENT
    checkout.card("net", sha256="null")
    checkout("net")
    assert (checkout.cache / "checksums.txt").read_text() == f"{sha256(CONTENT)}  net.pt\n"
    (checkout.cache / "net.pt").write_bytes(CONTENT[:-1] + b"?")
    refused(checkout("net"), "net.pt has sha256", sha256(CONTENT), "delete")
    assert (checkout.cache / "net.pt").read_bytes() == CONTENT[:-1] + b"?"  # a user's file is not deleted
    (checkout.cache / "net.pt").unlink()
    web.files["net.pt"] = b"something else"  # the host changed the file
    refused(checkout("net"), sha256(CONTENT), "deleted what was fetched")
    assert checkout.left() == ["checksums.txt"]


def test_a_file_placed_by_hand_is_taken_up(checkout, web):
    checkout.card("net")
    checkout.cache.mkdir()
    (checkout.cache / "net.pt").write_bytes(CONTENT)
    assert checkout("net").returncode == 0 and web.asked == []
    assert sha256(CONTENT) in (checkout.cache / "checksums.txt").read_text()


@pytest.mark.parametrize("entries", [{"sha256": "0" * 64}, {"bytes": 7}])
def test_a_wrong_file_is_deleted(checkout, web, entries):
    web.files["net.pt"] = CONTENT
    checkout.card("net", **entries)
    refused(checkout("net"), "not " + str(*entries.values()), "not there yet: net")
    assert checkout.left() == []


def test_a_truncated_part_is_resumed(checkout, web):
    web.files["net.pt"] = CONTENT
    checkout.card("net", sha256=sha256(CONTENT))
    checkout.cache.mkdir()
    (checkout.cache / "net.pt.part").write_bytes(CONTENT[:1000])
    assert checkout("net").returncode == 0
    assert web.asked == [("net.pt", 1000)] and (checkout.cache / "net.pt").read_bytes() == CONTENT


def test_a_broken_transfer_goes_on_where_it_broke(checkout, web):
    web.files["net.pt"], web.faults["net.pt"] = CONTENT, ["short"]
    checkout.card("net", sha256=sha256(CONTENT))
    assert checkout("net").returncode == 0
    assert web.asked == [("net.pt", 0), ("net.pt", len(CONTENT) // 2)]


def test_a_transfer_that_keeps_breaking_keeps_what_arrived(checkout, web):
    web.files["net.pt"], web.faults["net.pt"] = CONTENT, ["short", "short"]
    checkout.card("net", sha256=sha256(CONTENT))
    refused(checkout("net"), "broke 2 times", "run the same command again")
    assert checkout.left() == ["net.pt.part"]
    assert checkout("net").returncode == 0 and checkout.left() == ["checksums.txt", "net.pt"]


def test_a_host_that_cannot_resume_is_asked_from_the_start(checkout, web):
    web.files["net.pt"], web.ranges = CONTENT, False
    checkout.card("net", sha256=sha256(CONTENT))
    checkout.cache.mkdir()
    (checkout.cache / "net.pt.part").write_bytes(CONTENT[:1000])
    assert checkout("net").returncode == 0 and (checkout.cache / "net.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"too much"])
def test_a_complete_or_overlong_part_ends_well(checkout, web, part):
    web.files["net.pt"] = CONTENT
    checkout.card("net")
    checkout.cache.mkdir()
    (checkout.cache / "net.pt.part").write_bytes(part)
    assert checkout("net").returncode == 0 and (checkout.cache / "net.pt").read_bytes() == CONTENT
    assert checkout.left() == ["checksums.txt", "net.pt"]


def test_a_busy_host_is_asked_again_and_a_missing_file_is_not(checkout, web):
    web.files["net.pt"], web.faults["net.pt"] = CONTENT, [503]
    checkout.card("net")
    checkout.card("gone")
    refused(checkout("gone", "net"), "answers 404", "not there yet: gone")
    assert [name for name, _ in web.asked] == ["gone.pt", "net.pt", "net.pt"]
    assert checkout.left() == ["checksums.txt", "net.pt"]


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><html>virus scan warning", b"\n <HTML><body>", b'<?xml version="1.0"?><Error>']
)
def test_a_web_page_is_no_checkpoint(checkout, web, page):
    web.files["net.pt"] = page
    checkout.card("net", page="https://drive.example.org/view")
    process = checkout("net")
    refused(process, "web page", "deleted what was fetched")
    assert checkout.left() == []
    assert "https://drive.example.org/view" in process.stdout and str(checkout.cache / "net.pt") in process.stdout


def test_a_web_page_placed_by_hand_is_refused(checkout):
    checkout.card("net")
    checkout.cache.mkdir()
    (checkout.cache / "net.pt").write_text("<!doctype html>")
    refused(checkout("net"), "web page", "delete")


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00(X", b"PK\x03\x04<html", b"<\x01\x00\x00\x00\x00\x00\x00{}"])
def test_a_checkpoint_is_no_web_page(checkout, web, content):
    web.files["net.pt"] = content
    checkout.card("net")
    assert checkout("net").returncode == 0


def test_an_empty_file_is_refused(checkout, web):
    web.files["net.pt"] = b""
    checkout.card("net")
    refused(checkout("net"), "empty file")
    assert checkout.left() == []


def test_terms_that_must_be_accepted_are_named_and_nothing_is_asked(checkout, web):
    checkout.card("images", terms="https://terms.example.org", page="https://page.example.org")
    process = checkout("images")
    refused(process, "not there yet: images")
    assert web.asked == [] and "https://terms.example.org" in process.stdout
    assert "https://page.example.org" in process.stdout


def test_the_mirror_is_asked_for_everything(checkout, web):
    web.files["weights/net.pt"] = web.files["weights/images.pt"] = CONTENT
    checkout.card("net", url="https://127.0.0.1:9/model.ckpt")
    checkout.card("images", terms="https://terms.example.org")
    assert checkout("all", PARTICLEDAPS_MIRROR=f"{web.address}/weights/").returncode == 0
    assert [name for name, _ in web.asked] == ["weights/net.pt", "weights/images.pt"]


# --- encryption ------------------------------------------------------------------------------------------------------


def test_a_mirror_without_encryption_is_used_with_a_warning_and_checked(checkout, web):
    web.files["net.pt"] = web.files["other.pt"] = CONTENT
    checkout.card("net", sha256=sha256(CONTENT))
    checkout.card("other", sha256="0" * 64)
    process = checkout("net", PARTICLEDAPS_MIRROR=web.plain_address)
    assert process.returncode == 0 and (checkout.cache / "net.pt").read_bytes() == CONTENT
    assert process.stderr == (
        f"download.sh: PARTICLEDAPS_MIRROR={web.plain_address} is not encrypted: anyone on the way can change files; "
        "checksums are still compared\n"
    )
    refused(checkout("other", PARTICLEDAPS_MIRROR=web.plain_address.upper()), "is not encrypted", "has sha256")
    assert checkout.left() == ["checksums.txt", "net.pt"]


@pytest.mark.parametrize("scheme", ["ftp://", "file://", "FILE:", "", "httpx://", "--output "])
def test_a_mirror_of_another_kind_is_refused_before_anything_starts(checkout, web, tmp_path, scheme):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "net.pt").write_bytes(CONTENT)
    checkout.card("net")
    process = checkout("net", PARTICLEDAPS_MIRROR=f"{scheme}{tmp_path}/mirror")
    refused(process, f"PARTICLEDAPS_MIRROR={scheme}", "must begin with https://", status=2)
    assert process.stderr.count("\n") == 1 and process.stdout == "" and not checkout.cache.exists()


def test_a_redirection_that_leaves_encryption_is_refused(checkout, web):
    web.files["net.pt"] = web.files["new.pt"] = CONTENT
    web.moved = {"net.pt": f"{web.plain_address}/new.pt"}
    checkout.card("net")
    process = checkout("net")
    refused(process, f"refused: {web.address}/net.pt is or leads to an address without https", "not there yet: net")
    assert web.asked == [("net.pt", 0)] and checkout.left() == []
    web.moved = {"net.pt": f"{web.address}/new.pt"}
    assert checkout("net").returncode == 0 and (checkout.cache / "net.pt").read_bytes() == CONTENT


def test_a_host_that_cannot_prove_its_name_is_refused(checkout, web):
    web.files["net.pt"] = CONTENT
    checkout.card("net")
    refused(checkout("net", CURL_CA_BUNDLE=""), "curl failed with status 60", "not there yet: net")
    assert checkout.left() == []


@pytest.mark.parametrize("mirror, allowed", [("", "https"), ("https://a.org", "https"), ("http://a.org", "http,https")])
def test_every_call_of_curl_is_bound_to_its_protocols(checkout, tmp_path, mirror, allowed):
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "curl"
    fake.write_text(f'#!/bin/sh\necho "$*" >>"{tmp_path}/calls"\nprintf 416\nexit 22\n')  # 416: asks for the size
    fake.chmod(0o755)
    checkout.card("net")
    checkout("net", PARTICLEDAPS_MIRROR=mirror, PATH=f"{tmp_path}/bin:{os.environ['PATH']}", PARTICLEDAPS_ATTEMPTS=1)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 and "--head" in calls[1] and "--head" not in calls[0]
    assert all(call.startswith(f"--proto ={allowed} --proto-redir ={allowed} ") for call in calls)


# --- archives, conversion, places ------------------------------------------------------------------------------------


def test_the_member_of_an_archive_becomes_the_file(checkout, web):
    web.files["ffhq.zip"] = archive({"model.ckpt": CONTENT, "readme": b"-"})
    entries = {"fetched_as": "net.zip", "member": "model.ckpt", "sha256": sha256(CONTENT), "bytes": len(CONTENT)}
    checkout.card("net", url=f"{web.address}/ffhq.zip", **entries)
    assert checkout("net").returncode == 0
    assert (checkout.cache / "net.pt").read_bytes() == CONTENT
    assert checkout.left() == ["checksums.txt", "net.pt"]


def test_an_archive_without_its_member_or_damaged_is_refused(checkout, web):
    web.files["net.zip"], web.files["other.zip"] = archive({"other": b"-"}), b"PK\x03\x04 no archive"
    for name in ("net", "other"):
        checkout.card(name, url=f"{web.address}/{name}.zip", fetched_as=f"{name}.zip", member="model.ckpt")
    refused(checkout("net"), "net.zip holds no model.ckpt")
    refused(checkout("other"), "other.zip is not a readable zip archive")
    assert not any(name.endswith((".pt", ".unpack", ".part")) for name in checkout.left())


def test_a_data_set_becomes_a_folder_and_its_archive_goes(checkout, web):
    web.files["set.zip"] = archive({"test_ffhq/0.png": b"0", "test_ffhq/1.png": b"1", "__MACOSX/x": b"-"})
    web.files["flat.zip"] = archive({"a.png": b"0", "b.png": b"1"})
    for name in ("set", "flat"):
        entries = {"place": "dataset", "file": name, "fetched_as": f"{name}.zip"}
        checkout.card(name, url=f"{web.address}/{name}.zip", **entries)
    assert checkout("all").returncode == 0
    data = checkout.root / "dataset"
    assert checkout.left(data) == ["flat", "set"]
    assert checkout.left(data / "set") == ["0.png", "1.png"] and checkout.left(data / "flat") == ["a.png", "b.png"]
    assert "is there" in checkout("set").stdout and len(web.asked) == 2


def test_without_unzip_python_unpacks(checkout, web, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    needed = "bash curl awk sha256sum cut tr head wc cat mv rm mkdir find df basename dirname python3 sleep env"
    for tool in needed.split():
        (tools / tool).symlink_to(shutil.which(tool))
    web.files["net.zip"] = archive({"model.ckpt": CONTENT})
    checkout.card("net", url=f"{web.address}/net.zip", fetched_as="net.zip", member="model.ckpt")
    assert checkout("net", PATH=tools).returncode == 0
    assert (checkout.cache / "net.pt").read_bytes() == CONTENT


def test_a_missing_tool_is_named(checkout, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "awk", "tr", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    checkout.card("net")
    refused(checkout("net", PATH=tools), "needs curl")


def test_weights_of_torch_hub_go_where_torch_looks(checkout, web):
    web.files["net.pt"] = CONTENT
    checkout.card("net", place="torch_hub")
    assert checkout("net").returncode == 0
    assert (checkout.hub / "net.pt").read_bytes() == CONTENT
    (checkout.hub / "net.pt").write_bytes(b"other")
    refused(checkout("net"), "has sha256")


def test_a_checkpoint_is_converted_once(checkout, web):
    web.files["net.pt"] = CONTENT
    checkout.card("net", becomes="net")
    assert checkout("net").returncode == 0
    assert (checkout.cache / "net" / "card.json").read_text() == "net.pt"
    assert "converting" not in checkout("net").stdout
    (checkout.cache / "net.pt").unlink()  # the folder is all that a run needs
    process = checkout("net")
    assert process.returncode == 0 and "is there, converted" in process.stdout and len(web.asked) == 1


def test_without_an_environment_the_conversion_is_told(checkout, web):
    web.files["net.pt"] = CONTENT
    checkout.card("net", becomes="net")
    process = checkout("net", PYTHON=checkout.root / ".venv" / "bin" / "python")
    assert process.returncode == 0
    assert f'convert_checkpoint.py "{checkout.cache}/net.pt" "{checkout.cache}/net"' in process.stdout


def test_a_failed_conversion_keeps_the_download(checkout, web):
    web.files["net.pt"] = b"bad"
    checkout.card("net", becomes="net")
    process = checkout("net")
    assert process.returncode == 1 and "no such architecture" in process.stderr
    assert "the conversion failed" in process.stderr and "not there yet: net" in process.stderr
    assert checkout.left() == ["checksums.txt", "net.pt"]


# --- unusual paths ---------------------------------------------------------------------------------------------------


def test_a_cache_with_blanks_elsewhere_is_linked(checkout, web, tmp_path):
    web.files["net.pt"] = CONTENT
    checkout.card("net", becomes="net")
    cache = tmp_path / "a cache's $HOME"
    assert checkout("net", PARTICLEDAPS_CACHE=cache).returncode == 0
    assert checkout.left(cache) == ["checksums.txt", "net", "net.pt"]
    assert (checkout.cache / "net").resolve() == cache / "net"
    assert (checkout.cache / "net" / "card.json").read_text() == "net.pt"
    assert checkout("net", PARTICLEDAPS_CACHE=cache).returncode == 0 and len(web.asked) == 1


def test_a_relative_cache_counts_from_the_callers_folder(checkout, web, tmp_path):
    web.files["net.pt"] = CONTENT
    checkout.card("net")
    assert checkout("net", PARTICLEDAPS_CACHE="weights").returncode == 0
    assert (tmp_path / "weights" / "net.pt").exists()
    assert (checkout.cache / "net.pt").resolve() == tmp_path / "weights" / "net.pt"


def test_a_cache_that_cannot_be_made_or_written_is_named(checkout, tmp_path):
    checkout.card("net")
    (tmp_path / "file").write_text("")
    refused(checkout("net", PARTICLEDAPS_CACHE=tmp_path / "file" / "cache"), "cannot create", "PARTICLEDAPS_CACHE")
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(checkout("net", PARTICLEDAPS_CACHE=tmp_path / "locked"), "cannot write into")


@pytest.mark.parametrize("attempts", ["many", "0", "-1", ""])
def test_the_number_of_attempts_is_checked(checkout, web, attempts):
    web.files["net.pt"] = CONTENT
    checkout.card("net")
    process = checkout("net", PARTICLEDAPS_ATTEMPTS=attempts)
    if attempts:
        refused(process, f"PARTICLEDAPS_ATTEMPTS={attempts}", status=2)
    else:
        assert process.returncode == 0  # empty is unset


def test_a_disk_that_is_too_small_is_refused_before_the_first_connection(checkout, web):
    checkout.card("net", megabytes=10**9)
    refused(checkout("net"), "too small", "PARTICLEDAPS_CACHE")
    assert web.asked == []


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_two_downloads_do_not_share_a_cache(checkout, web):
    checkout.card("net")
    checkout.cache.mkdir()
    with subprocess.Popen(["flock", checkout.cache, "sh", "-c", "echo locked; read x"], stdin=-1, stdout=-1) as holder:
        assert holder.stdout.readline() == b"locked\n"
        refused(checkout("net"), "another download.sh")
        holder.stdin.close()
    assert web.asked == []
