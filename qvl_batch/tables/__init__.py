"""Partitions, fragments, commits, ledger, catalog, checks and search in Lance."""
