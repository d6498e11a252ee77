"""The index job as a script, for `ray job submit -- python pipelines/index.py ROOT`."""

import sys

from qvl_batch.cli import main

if __name__ == "__main__":
    main(["index", *sys.argv[1:]])
