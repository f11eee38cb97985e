"""The console script `genrec`.

Outside the package, because the package refuses to import where torch or the operator libraries
are missing or broken, and `genrec info` is there to say so.
"""

import importlib.util
import os
import sys
from pathlib import Path

# OpenMP threads that wait without spinning: two threads on a busy machine took
# 14 to 28 s an epoch of the compact model spinning, 4 to 5 s waiting.  It has to be
# said before torch is loaded, and whoever has said otherwise is obeyed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
