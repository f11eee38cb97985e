"""The README's examples run as they stand there."""

import pkgutil
import re
from pathlib import Path

import pytest

NEEDS = {"hf": ("transformers", "accelerate"), "trl": ("trl",)}
README = Path(__file__).resolve().parents[1] / "README.md"


def test_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    losses = [float(line) for line in printed[:4]]
    assert losses[-1] < losses[0], "four steps on one batch must lower its loss"
    assert "tensor" in printed[4]


def test_pictures_and_links_exist():
    text = README.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    for link in links:
        assert (README.parent / link).exists(), link


@pytest.mark.parametrize(
    "page", sorted((README.parent / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_pages_run_and_point_to_what_exists(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    text = page.read_text()
    for integration, modules in NEEDS.items():
        if f"integrations.{integration}" in text:
            for module in modules:
                pytest.importorskip(module)
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, str(page), "exec"), namespace)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    # Also where a line is for another program: verl's external_lib, vLLM's --logits-processors.
    for name in re.findall(r"\bgenrec_ext(?:\.\w+)+(?::\w+)?", text):
        assert exists(name), name


def exists(name):
    """Whether `package.module.attribute` or `package.module:attribute` is there."""
    try:
        pkgutil.resolve_name(name)
    except ImportError as error:  # a class that needs a package says so by its name
        return str(error).startswith(name.rpartition(":")[2] + " needs")
    except AttributeError:
        return False
    return True


def test_a_name_that_is_not_there_is_noticed():
    assert exists("genrec_ext.sage_loss") and exists("genrec_ext.integrations.vllm")
    for name in ("sage_los", "integrations.vll", "integrations.vllm:TrieLogitsProcesso"):
        assert not exists(f"genrec_ext.{name}")
