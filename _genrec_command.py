"""The console script `genrec`.

Outside the package, because the package refuses to import where torch or the operator libraries
are missing or broken, and `genrec info` is there to say so.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    try:
        from genrec_ext.cli import main as command
    except ImportError as error:
        if sys.argv[1:2] == ["info"]:
            info = _info()
            facts = info.collect()
            print(info.as_json(facts) if "--json" in sys.argv else info.as_text(facts))
            return 1
        print(f"genrec: {error}", file=sys.stderr)
        return 2
    return command()


def _info():
    """genrec_ext/info.py without the package around it."""
    package = importlib.util.find_spec("genrec_ext")
    path = Path(package.submodule_search_locations[0]) / "info.py"
    spec = importlib.util.spec_from_file_location("genrec_info", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
