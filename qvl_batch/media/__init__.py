"""Bytes to frames, pages and text, from any store; manifests."""
