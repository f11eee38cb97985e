"""The oldest supported transformers: it is fetched, and decoding and vocabularies run with it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import child_environment

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "4.57.6"  # the last of the oldest series
TESTS = ("test_hf.py", "test_hf_vocabulary.py")


def test_the_oldest_series_passes_the_same_tests(tmp_path):
    place = tmp_path / "old"
    # What it pins otherwise than later ones do; the rest is there.
    wanted = [f"transformers=={OLDEST}", "huggingface-hub>=0.34,<1.0", "tokenizers>=0.22,<=0.23.0"]
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
    if subprocess.run([*fetch, *wanted], capture_output=True).returncode:
        pytest.skip(f"transformers {OLDEST} cannot be fetched here")
    environment = child_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(place), environment["PYTHONPATH"]])
    files = [str(ROOT / "python_tests" / name) for name in TESTS]
    check = f"import transformers; assert transformers.__version__ == {OLDEST!r}"
    for command in (["-c", check], ["-m", "pytest", "-q", "-p", "no:cacheprovider", *files]):
        started = [sys.executable, *command]
        ran = subprocess.run(started, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


def test_the_stated_range_is_what_the_package_asks_for():
    series = OLDEST.rpartition(".")[0]
    found = re.findall(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found and set(found) == {series}
