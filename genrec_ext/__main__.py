"""python -m genrec_ext: the `genrec` command."""

import sys

from .cli import main

sys.exit(main())
