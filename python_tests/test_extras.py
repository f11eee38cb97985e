"""Each extra of pyproject.toml suffices for what it is for: torch, NumPy and its own packages.

A process in which every other installed package is absent imports the modules of the extra and runs
something small of each.  What is optional to a dependency, behind an extra of its own, is absent
too.
"""

import functools
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from builders import child_environment

from genrec_ext.data import generate

requirements = pytest.importorskip("packaging.requirements")
tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read by Python 3.11 and later")

ROOT = Path(__file__).resolve().parents[1]
CORE = ("torch", "numpy")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# What tests and linting need is checked by running them.
TOOLS = ("test", "dev")

# What a process runs first: packages whose names follow are not to be found by anybody.
ABSENT = """
import json, sys
from importlib.machinery import PathFinder
modules, packages = map(set, json.loads(sys.argv.pop(1)))

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in modules
        return None if hidden else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*context):
        for found in PathFinder.find_distributions(*context):
            if found.name not in packages:
                yield found

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.path_importer_cache.clear()
"""

CHECKS = {
    "": """
import torch, genrec_ext.models, genrec_ext.tokenizers
trie = genrec_ext.Trie.from_items([[0, 1], [0, 2], [3, 1]])
nodes = torch.zeros(1, 1).long()
scores, *_ = genrec_ext.trie_beam_step(torch.zeros(1, 4), torch.zeros(1, 1), nodes, trie, 0, 2)
assert scores.isfinite().all()
""",
    "train": """
from genrec_ext.cli import main
try:
    main(["train", "--help"])
except SystemExit as done:
    assert not done.code
small = ["--epochs", "1", "--stages", "sft", "--set", "model.width=16"]
assert main(["train", "--data", sys.argv[1], "--out", "run", *small]) == 0
assert "</html>" in open("run/report.html").read()
""",
    "tracking": """
from pathlib import Path
from genrec_ext.training.tracking import Journal
with Journal(Path("."), ("tensorboard",), {}) as journal:
    journal.note({"stage": "sft", "step": 3, "loss": 0.5, "seconds": 1.0})
assert list(Path("tensorboard").glob("events.out.tfevents.*"))
import trackio
""",
    "data": """
import polars
from genrec_ext import data
rows = [(user, item, 3 * user + item) for user in range(3) for item in range(4)]
names = ["user_id", "item_id", "timestamp"]
polars.DataFrame(rows, schema=names, orient="row").write_parquet("log.parquet")
assert data.load("log.parquet").num_items == 4
""",
    "hf": """
import torch, transformers
from genrec_ext import Trie
from genrec_ext.integrations import hf
sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
model = transformers.T5ForConditionalGeneration(
    transformers.T5Config(vocab_size=9, decoder_start_token_id=0, **sizes)
).eval()
trie = Trie.from_items([[3, 5], [3, 6], [4, 5]])
found = hf.beam_search_hf(model, trie, width=3, input_ids=torch.tensor([[1, 2]]))
transformers.TrainingArguments(output_dir="out", report_to=[], use_cpu=True)
assert sorted(found.items.flatten().tolist()) == [0, 1, 2]
""",
    "trl": """
from genrec_ext.integrations.trl import SAGEConfig, SAGETrainer
import trl
assert issubclass(SAGETrainer, trl.GRPOTrainer)
assert isinstance(SAGEConfig(output_dir="out", use_cpu=True, bf16=False), trl.GRPOConfig)
""",
    # What `make bench` runs.
    "bench": """
import re, runpy
from pathlib import Path
bench = Path(sys.argv[2]) / "bench"
sys.path.insert(0, str(bench))
scripts = re.findall(r"bench/(bench_\\w+\\.py)", (bench.parent / "Makefile").read_text())
assert len(scripts) > 4
for script in scripts:
    sys.argv[1:] = ["--help"]
    try:
        runpy.run_path(str(bench / script), run_name="__main__")
    except SystemExit as done:
        assert not done.code
import pytest_benchmark
""",
    "docs": """
from mkdocs.config import load_config
config = load_config(sys.argv[2] + "/mkdocs.yml")
assert "mkdocstrings" in config.plugins and config.theme.name == "material"
""",
    "text": """
from genrec_ext.tokenizers import embeddings
import sentence_transformers
""",
}
# Nothing else imports what these are for.
BESIDE = {"tracking": ("train",)}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names):
    """Distributions that installing these would bring, as their metadata say."""
    found, asked = set(), set()
    left = [requirements.Requirement(name) for name in names]
    while left:
        one = left.pop()
        if (one.name, frozenset(one.extras)) in asked:
            continue
        asked.add((one.name, frozenset(one.extras)))
        try:
            needed = map(requirements.Requirement, metadata.requires(one.name) or ())
        except metadata.PackageNotFoundError:
            continue  # what is not here is absent anyway
        found.add(normal(one.name))
        for other in needed:
            extras = one.extras or {""}
            if not other.marker or any(other.marker.evaluate({"extra": e}) for e in extras):
                left.append(other)
    return found


@functools.cache
def absent(extra):
    """(modules, distributions) that an environment of this extra would not have."""
    names = [*CORE]
    for one in (extra, *BESIDE.get(extra, ())):
        names += EXTRAS.get(one, [])
    kept = closure(names)
    modules = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not module.startswith(("genrec", "_genrec"))
        and not kept & {normal(owner) for owner in owners}
    }
    packages = {one.name for one in metadata.distributions() if normal(one.name) not in kept}
    return sorted(modules), sorted(packages - {"genrec-ext"})


def run(extra, code, cwd, *words):
    environment = child_environment(HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    command = [sys.executable, "-c", ABSENT + code, json.dumps(absent(extra)), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A few users' items."""
    sequences = generate(seed=1, num_users=60, num_items=250).data.sequences
    lines = [" ".join(map(str, [u, *(items + 1)])) for u, items in enumerate(sequences, 1)]
    path = tmp_path_factory.mktemp("log") / "small.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_every_extra_is_here():
    assert set(CHECKS) == {"", *EXTRAS} - set(TOOLS)


@pytest.mark.parametrize("extra", CHECKS)
def test_an_extra_is_enough(extra, tmp_path, log):
    for requirement in map(requirements.Requirement, EXTRAS.get(extra, ())):
        if requirement.name == "wandb":
            continue  # no test has it; tracking checks for it by name
        try:
            metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{requirement.name} is not installed")
    result = run(extra, CHECKS[extra], tmp_path, log, ROOT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.mark.parametrize("extra, module", (("", "hypothesis"), ("data", "yaml"), ("hf", "pytest")))
def test_what_an_extra_does_not_bring_is_absent(extra, module, tmp_path):
    pytest.importorskip(module)
    assert module in absent(extra)[0]
    result = run(extra, f"import {module}", tmp_path)
    assert result.returncode and f"No module named '{module}'" in result.stderr
    code = "from importlib import util; raise SystemExit(util.find_spec(NAME) is not None)"
    assert run(extra, code.replace("NAME", repr(module)), tmp_path).returncode == 0


def test_a_dependency_that_an_extra_lacks_is_seen(tmp_path, log):
    result = run("data", CHECKS["docs"], tmp_path, log, ROOT)
    assert result.returncode and "No module named 'mkdocs'" in result.stderr
