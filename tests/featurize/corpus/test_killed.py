"""A pack or an adoption that is killed anywhere never looks finished, and a rerun gives what an unbroken run gives."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from featurize.corpus import adopt, pack_llava_json
from olavlm.data.corpus import Corpus
from olavlm.errors import OlaError

REPOSITORY = Path(__file__).parents[3]

# One process that forks: each child packs into a folder of its own and kills itself before its n-th rename or fsync.
KILLER = """
import os, signal, sys
from pathlib import Path
import pyarrow
from PIL import Image
from featurize.corpus import adopt, pack_llava_json

Image.init()  # what is imported late, once for all children
pyarrow.Table.from_pylist([{"a": 1}])

def run(out):
    if kind == "pack":
        pack_llava_json(Path(json_file), [Path(images)], out, 3, workers=1)
    else:
        adopt([Path(tar) for tar in tars], out, workers=1)

def counting(real, deadly):
    def call(*args, **options):
        global calls
        if (calls := calls + 1) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return call

folder, kind, json_file, images, *tars = sys.argv[1:]
calls, deadly = 0, 0
while True:
    deadly += 1
    child = os.fork()
    if not child:
        os.replace, os.fsync = counting(os.replace, deadly), counting(os.fsync, deadly)
        run(Path(folder, f"killed{deadly}"))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(deadly - 1)
"""


@pytest.fixture
def killed_runs(source, tmp_path):
    """Runs a kind of job, killed at each of its points in turn; returns their folders."""

    def run(kind, *tars):
        source.write()
        command = [sys.executable, "-c", KILLER, tmp_path, kind, source.json, source.images, *tars]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return [tmp_path / f"killed{i}" for i in range(1, int(result.stdout) + 1)]

    return run


@pytest.fixture
def rich_source(source):
    """Two tars and a bit of everything the lists hold."""
    source.add_many(range(4))
    source.add("s0", "1.jpg")
    source.add("gone", "gone.jpg")
    return source


def looks_unfinished(out):
    with pytest.raises(OlaError, match="no corpus in"):
        Corpus.open(out)


def test_a_killed_pack_resumes_to_the_same_bytes(rich_source, tmp_path, contents, killed_runs):
    killed = killed_runs("pack")
    assert len(killed) > 8
    pack_llava_json(rich_source.json, [rich_source.images], tmp_path / "unbroken", 3)
    expected = contents(tmp_path / "unbroken")
    resumed = 0
    for out in killed:
        if not (out / "corpus.json").exists():
            looks_unfinished(out)
        calls = []
        report = pack_llava_json(rich_source.json, [rich_source.images], out, 3, lambda *call, c=calls: c.append(call))
        resumed += len(calls) < 6
        assert contents(out) == expected
        assert len(report.left_out) == 1
        assert len(report.renamed) == 1
    assert resumed >= 3, "no rerun took up the tar that was packed"


def test_a_line_cut_while_it_was_written_counts_for_nothing(rich_source, tmp_path, contents, killed_runs):
    pack_llava_json(rich_source.write(), [rich_source.images], tmp_path / "unbroken", 3)
    cut = 0
    for out in killed_runs("pack"):
        pending = out / "pending.jsonl"
        last = json.loads(pending.read_text().splitlines()[-1]) if pending.exists() else {}
        if "tar" in last and not (out / last["tar"]["path"]).exists():  # a tar gets its name when its line is written
            pending.write_bytes(pending.read_bytes()[:-5])
            cut += 1
        pack_llava_json(rich_source.json, [rich_source.images], out, 3)
        assert contents(out) == contents(tmp_path / "unbroken")
    assert cut >= 6


# Packs into a corpus and stops at the first sample, until a line comes from outside.
HELD = """
import sys
from pathlib import Path
from featurize.corpus import pack_llava_json

def hold(*_):
    print("held", flush=True)
    sys.stdin.readline()

if __name__ == "__main__":
    pack_llava_json(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]), 2, hold, workers=2)
"""


def test_of_two_growers_the_second_is_refused_and_a_killed_one_leaves_no_worker(rich_source, tmp_path, contents):
    (tmp_path / "held.py").write_text(HELD)
    arguments = [rich_source.write(), rich_source.images, tmp_path / "out"]
    command = [sys.executable, tmp_path / "held.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(OlaError, match="another process is packing"):
            pack_llava_json(rich_source.json, [rich_source.images], tmp_path / "out", 2)
        descendants = psutil.Process(first.pid).children(recursive=True)
        assert len(descendants) >= 2
        first.kill()
    _, alive = psutil.wait_procs(descendants, timeout=60)
    assert not alive
    for out in ("out", "unbroken"):
        pack_llava_json(rich_source.json, [rich_source.images], tmp_path / out, 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_another_job_drops_what_a_killed_one_left(rich_source, tmp_path, contents, killed_runs):
    killed = killed_runs("pack")
    rich_source.add_many(range(10, 17))
    rich_source.write()
    pack_llava_json(rich_source.json, [rich_source.images], tmp_path / "unbroken", 2)
    for out in killed:
        if (out / "corpus.json").exists():
            continue
        pack_llava_json(rich_source.json, [rich_source.images], out, 2)
        assert contents(out) == contents(tmp_path / "unbroken")


def test_a_killed_adoption_resumes_to_the_same_bytes(rich_source, tmp_path, contents, killed_runs):
    pack_llava_json(rich_source.write(), [rich_source.images], tmp_path / "packed", 2)
    tars = [tmp_path / "packed" / "tars" / f"{i:06d}.tar" for i in range(3)]
    data = bytearray(tars[0].read_bytes())
    data[512 + 2 : 512 + 300] = bytes(298)  # an image that cannot be decoded any more
    tars[0].write_bytes(data)
    expected_report = adopt(tars, tmp_path / "unbroken")
    assert len(expected_report.left_out) == 1
    for out in killed_runs("adopt", *tars):
        if not (out / "corpus.json").exists():
            looks_unfinished(out)
        report = adopt(tars, out)
        assert contents(out) == contents(tmp_path / "unbroken")
        if report.tars:
            assert report.left_out == expected_report.left_out


@pytest.mark.parametrize("job", ["pack", "adopt"])
def test_a_disk_that_fills_up_anywhere_leaves_the_corpus_as_it_was(source, tmp_path, contents, job):
    """A limit on the size of files stands for the disk: the first write beyond it fails."""

    def grow(out, tars):
        if job == "pack":
            pack_llava_json(source.json, [source.images], out, 5)
        else:
            adopt(tars, out)

    source.add_many(range(2))
    pack_llava_json(source.write(), [source.images], tmp_path / "old")
    source.add_many(range(2, 20))
    source.add("gone", "gone.jpg")
    pack_llava_json(source.write(), [source.images], tmp_path / "new", 5)
    tars = sorted((tmp_path / "new" / "tars").iterdir())
    grow(shutil.copytree(tmp_path / "old", tmp_path / "unbroken"), tars)
    before, expected = contents(tmp_path / "old"), contents(tmp_path / "unbroken")
    failed = 0
    for limit in (1, 200, 600, 1500, 2500, 4000, 6000, 10_000):
        out = shutil.copytree(tmp_path / "old", tmp_path / str(limit))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            grow(out, tars)
        except OSError as error:
            full = error.errno == errno.EFBIG
        else:
            full = False
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if full:
            failed += 1
            kept = contents(out)
            assert {name: kept[name] for name in before if "jsonl" not in name} == {
                name: data for name, data in before.items() if "jsonl" not in name
            }
        grow(out, tars)
        assert contents(out) == expected
    assert failed >= 4
