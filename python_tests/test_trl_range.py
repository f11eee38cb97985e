"""The oldest supported TRL: it is fetched alone, and the trainer's tests run with it."""

import re
from pathlib import Path

import pytest
from builders import passes_beside

pytest.importorskip("trl")

from genrec_ext.integrations.trl import BEYOND, OLDEST

ROOT = Path(__file__).resolve().parents[1]


def test_the_oldest_version_passes_the_same_tests(tmp_path):
    passes_beside(tmp_path / "old", [f"trl=={OLDEST}"], ["test_trl.py"], GENREC_TRL=OLDEST)


def test_the_stated_range_is_what_the_package_asks_for():
    wanted = re.findall(r'"(trl>=[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert wanted == [f"trl>={OLDEST},<{BEYOND}"] * 2  # the extras trl and test
