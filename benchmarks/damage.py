r"""What survives damaged results and errors of the disk: whole processes, tried and counted, with what they print.

    python benchmarks/damage.py [--scale 0.34]

Every trial works on three small pictures, as ``faults.py`` does. It survives if the process leaves no trace of Python,
and the same command, started again where the disk is mended, ends with every record in place and the numbers of an
undisturbed run. Full, write-protected and crowded disks are small file systems in memory; mounting them needs root.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.faults import Bench  # noqa: E402

Told = tuple[int, str]
"""Exit status and output of a process."""


def run(bench: Bench, pictures: Path, name: str, *more: str) -> Told:
    """A whole process."""
    return told(bench.start(pictures, name, *more, output=subprocess.PIPE))


def told(process: subprocess.Popen) -> Told:
    """What a process says until it ends."""
    output, _ = process.communicate()
    return process.returncode, output.decode(errors="replace")


def flip_a_bit(path: Path) -> None:
    """The last digit of the file becomes another one: it can still be read as JSON."""
    content = bytearray(path.read_bytes())
    place = max(i for i, byte in enumerate(content) if chr(byte).isdigit())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Half of the file is left."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def become_a_folder(path: Path) -> None:
    """A folder of this name."""
    path.unlink()
    path.mkdir()


def damages(number: int) -> dict[str, tuple[str, Callable[[Path], object]]]:
    """Name -> file below the results' folder, and what is done to it."""
    record, other = f"records/{number:05d}.json", f"{(number + 1) % 3:05d}.json"
    return {
        "record: empty": (record, lambda path: path.write_bytes(b"")),
        "record: cut": (record, cut),
        "record: zeros": (record, lambda path: path.write_bytes(bytes(path.stat().st_size))),
        "record: `{}`": (record, lambda path: path.write_text("{}")),
        "record: a list": (record, lambda path: path.write_text("[1, 2]")),
        "record: one bit flipped": (record, flip_a_bit),
        "record: not UTF-8": (record, lambda path: path.write_bytes(b"\xff\xfe\x80" * 9)),
        "record: a folder in its place": (record, become_a_folder),
        "record: another image's": (record, lambda path: shutil.copy(path.with_name(other), path)),
        "a stray file among the records": ("records/notes.json", lambda path: path.write_text("by hand")),
        "floats: cut": (f"floats/{number:05d}.npz", cut),
        "sheet: cut": (f"sheets/{number:05d}.png", cut),
        "metrics.json: cut": ("metrics.json", cut),
        "images.json: cut": ("images.json", cut),
    }


def damaged(bench: Bench, pictures: Path, name: str, kind: str, number: int) -> tuple[Told, bool]:
    """Damage the results of a finished run and start it again."""
    shutil.copytree(bench.results("undisturbed"), bench.results(name))
    place, damage = damages(number)[kind]
    damage(bench.results(name) / place)
    found = run(bench, pictures, name)
    return found, found[0] == 0 and bench.is_right(name, pictures, 3)


def not_asked_for(bench: Bench, pictures: Path, name: str, number: int) -> tuple[Told, bool]:
    """A damaged record of an image that is not asked for now."""
    shutil.copytree(bench.results("undisturbed"), bench.results(name))
    cut(bench.results(name) / "records" / f"{2 - number % 2:05d}.json")
    found = run(bench, pictures, name, "data.end_id=1")
    again = run(bench, pictures, name)
    return found, found[0] == 0 == again[0] and bench.is_right(name, pictures, 3)


def mount(place: Path, options: str) -> None:
    """A file system in memory, or its options changed."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)


@contextmanager
def small_disk(place: Path, options: str) -> Iterator[None]:
    """A file system in memory, for a while."""
    place.mkdir(parents=True)
    mount(place, options)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def on_a_disk(
    options: str, mended: str, status: int, first: str = ""
) -> Callable[[Bench, Path, str, int], tuple[Told, bool]]:
    """A run on a disk with ``options``, which must end with ``status``, then one on the mended disk.

    Under the options ``first``, where there are any, one image is done before.
    """

    def trial(bench: Bench, pictures: Path, name: str, number: int) -> tuple[Told, bool]:
        with small_disk(bench.results(name), first or options.format(number=number)):
            if first:
                run(bench, pictures, name, "data.end_id=1")
                mount(bench.results(name), f"remount,{options}")
            found = run(bench, pictures, name)
            mount(bench.results(name), f"remount,{mended}")
            again = run(bench, pictures, name)
            return found, found[0] == status and again[0] == 0 and bench.is_right(name, pictures, 3)

    return trial


def vanished(bench: Bench, pictures: Path, name: str, number: int) -> tuple[Told, bool]:
    """The results' folder is removed while the process works."""
    process = bench.start(pictures, name, output=subprocess.PIPE)
    while not (bench.results(name) / "records" / f"{number % 2:05d}.json").exists():
        time.sleep(0.005)
    shutil.rmtree(bench.results(name), ignore_errors=True)
    found, again = told(process), run(bench, pictures, name)
    return found, found[0] == 4 and again[0] == 0 and bench.is_right(name, pictures, 3)


def one_bad_of_ten(bench: Bench, pictures: Path, name: str, number: int) -> tuple[Told, bool]:
    """Nine pictures and one that cannot be read, which is replaced by a good one afterwards."""
    ten = bench.pictures(name, range(10))
    (ten / f"{number:02d}.png").write_bytes(b"no picture")
    found = run(bench, ten, name)
    bench.picture(number).save(ten / f"{number:02d}.png")
    again = run(bench, ten, name)
    return found, found[0] == 5 and again[0] == 0 and bench.is_right(name, ten, 10)


DISKS = {
    "disk full": on_a_disk("size=12{number}k", "size=40m", 4),
    "no inodes left": on_a_disk("size=40m,nr_inodes=1{number}", "nr_inodes=0", 4),
    "disk read-only after the first image": on_a_disk("ro", "rw", 2, first="size=40m"),
}
OTHERS = {
    "record: cut, of an image not asked for": not_asked_for,
    "the folder vanishes in the middle": vanished,
    "one file of ten is no picture": one_bad_of_ten,
}


def words(output: str) -> str:
    """What is printed that an undisturbed run does not print."""
    row = re.compile(r"\S+ {4,}\S")
    usual = ("LPIPS", "finished before", "%,", "level", "results in", "PSNR in dB", "image  ", "   -")
    lines = output.replace("\r", "\n").splitlines()
    strange = [
        line for line in lines if line.strip() and not row.match(line) and not any(word in line for word in usual)
    ]
    return " / ".join(strange[:2]) or "nothing"


def trials(bench: Bench, pictures: Path) -> dict[str, Callable[[str, int], tuple[Told, bool]]]:
    """Name -> what is tried."""
    kinds: dict[str, Callable[[str, int], tuple[Told, bool]]] = {
        kind: (lambda name, number, kind=kind: damaged(bench, pictures, name, kind, number)) for kind in damages(0)
    }
    others = OTHERS | (DISKS if os.geteuid() == 0 else {})
    return kinds | {k: (lambda name, number, t=t: t(bench, pictures, name, number)) for k, t in others.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of three trials each (1)")
    parser.add_argument("--only", default="", help="part of a fault's name")
    arguments = parser.parse_args()
    print("| fault | tried | survived | lost | exit status | printed |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        pictures = bench.pictures("pictures", range(3))
        bench.run(pictures, "undisturbed")
        bench.is_right("undisturbed", pictures, 3)
        for place, (kind, trial) in enumerate(trials(bench, pictures).items()):
            if arguments.only not in kind:
                continue
            found = [trial(f"run_{place}_{number}", number) for number in range(max(round(3 * arguments.scale), 1))]
            survived = sum(right and "Traceback" not in output for (_, output), right in found)
            statuses = ", ".join(map(str, Counter(status for (status, _), _ in found)))
            said = words(found[0][0][1]).replace(scratch, "...").replace("|", "/")
            print(f"| {kind} | {len(found)} | {survived} | {len(found) - survived} | {statuses} | {said} |", flush=True)


if __name__ == "__main__":
    main()
