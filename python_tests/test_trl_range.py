"""The oldest supported TRL: it is fetched alone, and the trainer's tests run with it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    path = os.pathsep.join(filter(None, [str(tmp_path / "trl"), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)],
        env={**os.environ, "PYTHONPATH": path, "GENREC_TRL": OLDEST},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]


def test_the_stated_range_is_what_the_package_asks_for():
    wanted = re.findall(r'"(trl>=[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert wanted == [f"trl>={OLDEST},<{BEYOND}"] * 2  # the extras trl and test
