"""The oldest supported transformers: it is fetched, and decoding, vocabularies and losses run
with it."""

import re
from pathlib import Path

import pytest
from builders import passes_beside

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "4.57.6"  # the last of the oldest series


def test_the_oldest_series_passes_the_same_tests(tmp_path):
    # What it pins otherwise than later ones do, and datasets, which its Trainer imports where there
    # are some, of the time of that hub; the rest is there.
    wanted = ["huggingface-hub>=0.34,<1.0", "tokenizers>=0.22,<=0.23.0", "datasets==4.4.2"]
    tests = ["test_hf.py", "test_hf_vocabulary.py", "test_hf_losses.py"]
    passes_beside(tmp_path / "old", [f"transformers=={OLDEST}", *wanted], tests)


def test_the_stated_range_is_what_the_package_asks_for():
    series = OLDEST.rpartition(".")[0]
    found = re.findall(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found and set(found) == {series}
