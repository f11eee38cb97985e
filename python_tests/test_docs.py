"""The documentation's site builds without a warning, and says what the package has."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import genrec_ext

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    said = result.stdout + result.stderr
    assert result.returncode == 0 and "WARNING" not in said, said
    return out


def test_every_public_name_is_in_the_reference(site):
    page = (site / "reference" / "index.html").read_text()
    missing = [
        name for name in genrec_ext.__all__
        if name != "__version__" and f'id="genrec_ext.{name}"' not in page
    ]  # fmt: skip
    assert not missing
    assert 'id="genrec_ext.training.export.export"' in page
    assert not re.findall(r'<h\d id="(genrec_ext[\w.]*\._[a-zA-Z]\w*)"', page), "private"
    assert ":class:" not in page and ":func:" not in page


def test_every_benchmark_has_a_page(site):
    index = (site / "benchmarks" / "index.html").read_text()
    for path in (ROOT / "bench" / "results").glob("*.md"):
        assert (site / "benchmarks" / path.stem / "index.html").exists()
        assert f'href="{path.stem}/"' in index


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"(https?://[^\"]+)", text)
        assert not fetched, page
