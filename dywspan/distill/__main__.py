"""``python -m dywspan.distill`` is ``dywspan distill``."""

import sys

from ..cli import main

sys.exit(main(["distill", *sys.argv[1:]]))
