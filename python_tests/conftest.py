"""What every test module shares: deterministic hypothesis, one seed, where the real data lies."""

import dataclasses
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see _genrec_command.py

import hypothesis
import pytest
import torch
from torch.utils._pytree import tree_map

import genrec_ext

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where the operators' tests run them; references stay on the CPU, in float64",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "checks_indices: needs a build whose host looks at indices before a kernel runs"
    )
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but this torch sees no GPU")


# Files that take half a minute or more, the longest first: where files are shared among processes,
# none of these is begun when the others are done.
LONG = (
    "test_simulator.py",
    "test_cuda_build.py",
    "test_training.py",
    "test_distributed.py",
    "test_install.py",
    "test_transformers_range.py",
    "test_load.py",
    "test_extras.py",
    "test_checkpoints.py",
    "test_policy.py",
    "test_trl_range.py",
    "test_hf_losses.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def indices_checked(device):
    """Whether the host looks at indices before a kernel runs: on the CPU, and not where the CUDA
    library's host code stands in for the CPU's, over simulated kernels."""
    return device == "cpu" and not os.environ.get("GENREC_SIMULATED")


@pytest.fixture(autouse=True)
def _skip_unchecked(request, indices_checked):
    if request.node.get_closest_marker("checks_indices") and not indices_checked:
        pytest.skip("indices are not checked on the host: kernels treat wrong ones as outside")


class OnDevice:
    """genrec_ext with the tensors, tries and models of a call moved to a device, results back."""

    def __init__(self, device):
        self.device = device

    def there(self, x):
        if isinstance(x, (torch.Tensor, genrec_ext.Trie)):
            return x.to(self.device)
        if callable(x):  # a model of the test, which lives on the CPU
            return lambda *arguments: self.there(x(*tree_map(self.back, arguments)))
        return x

    def back(self, x):
        if dataclasses.is_dataclass(x):
            fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
            return dataclasses.replace(x, **tree_map(self.back, fields))
        return x.cpu() if isinstance(x, torch.Tensor) else x

    def __getattr__(self, name):
        function = getattr(genrec_ext, name)

        def call(*arguments, **settings):
            arguments, settings = tree_map(self.there, (arguments, settings))
            return tree_map(self.back, function(*arguments, **settings))

        return call


@pytest.fixture(scope="session")
def ours(device):
    """genrec_ext's operators, run on the tested device; on the CPU the module itself."""
    return genrec_ext if device == "cpu" else OnDevice(device)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def shared_data():
    """The folder of real interaction data, which a checkout alone does not have."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets (../shared/data) are not beside this checkout")
    return SHARED_DATA


def repeated_indices(loss: torch.Tensor) -> list[torch.Tensor]:
    """What a gradient is added through by an index that names a place more than once.

    On the CPU torch's own index adds there by several threads in no fixed order, so that the same
    training ends in other bits; an embedding, a gather or an index_select does not.
    """
    found, seen, left = [], set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [following for following, _ in node.next_functions]
        if "Index" in node.name() and hasattr(node, "_saved_indices"):
            given = [index for index in node._saved_indices if index is not None]
            if any(index.dtype == torch.bool for index in given):
                continue  # each place once
            places = torch.stack(torch.broadcast_tensors(*given), -1).flatten(0, -2)
            if len(torch.unique(places, dim=0)) < len(places):
                found += given
    return found
