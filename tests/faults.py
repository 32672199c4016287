"""Stop `make quick` at random moments, go on, and get the records of an undisturbed run.

python tests/faults.py [times]; a quarter of an hour. Also: two runs at once in one folder, from nothing."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def copy(folder):
    folder.mkdir()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.md")):
        shutil.copy(path, folder)
    return folder


def start(folder):
    return subprocess.Popen([sys.executable, "experiments.py", "all", "scale=quick"], cwd=folder,
                            start_new_session=True, stderr=subprocess.DEVNULL)


def records(folder):
    """File → its records, without the seconds."""
    found = {}
    for path in sorted((folder / "out-quick").glob("*.json")):
        lines = json.loads(path.read_text())["records"]
        found[path.name] = [{name: line[name] for name in line if name != "seconds"} for line in lines]
    return found


random.seed(0)
with tempfile.TemporaryDirectory() as where:
    calm, stopped = copy(Path(where) / "calm"), copy(Path(where) / "stopped")
    pair = start(calm), start(calm)
    assert [process.wait() for process in pair] == [0, 0], "two at once"
    for k in range(int(sys.argv[1]) if sys.argv[1:] else 20):
        process, how = start(stopped), random.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        try:
            process.wait(random.uniform(2, 15))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, how)
        done = len(list((stopped / ".cache").glob("*.pt")))
        print(k + 1, how.name, process.wait(), done, "jobs", flush=True)
    assert start(stopped).wait() == 0
    assert len(records(calm)) == 8 and records(calm) == records(stopped)
print("the records are the same")
