"""Kills and storage faults: nothing lost, nothing doubled."""
