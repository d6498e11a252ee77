"""The embed job as a script, for `ray job submit -- python pipelines/embed.py CONFIG.yaml`."""

import sys

from qvl_batch.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
