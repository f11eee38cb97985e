"""The oldest supported TRL: it is fetched alone, and the trainer's tests run with it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import child_environment

pytest.importorskip("trl")

from genrec_ext.integrations.trl import BEYOND, OLDEST

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "python_tests" / "test_trl.py"


def test_the_oldest_version_passes_the_same_tests(tmp_path):
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"trl=={OLDEST}"]
    fetched = subprocess.run(
        [*fetch, "--target", str(tmp_path / "trl")], capture_output=True, text=True
    )
    if fetched.returncode:
        pytest.skip(f"trl {OLDEST} cannot be fetched here")
    environment = child_environment(GENREC_TRL=OLDEST)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "trl"), environment["PYTHONPATH"]])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]


def test_the_stated_range_is_what_the_package_asks_for():
    wanted = re.findall(r'"(trl>=[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert wanted == [f"trl>={OLDEST},<{BEYOND}"] * 2  # the extras trl and test
