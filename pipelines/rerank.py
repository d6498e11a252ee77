"""The rerank job as a script, for `ray job submit -- python pipelines/rerank.py CONFIG.yaml`."""

import sys

from qvl_batch.cli import main

if __name__ == "__main__":
    main(["rerank", *sys.argv[1:]])
