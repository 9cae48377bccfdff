"""Learn a solver: ``accelerate launch training/distill.py --config training/configs/emoji_sd_dyweight.yaml``."""

import sys

from dywspan.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
