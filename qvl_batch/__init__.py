"""Turn a bucket of media into searchable, quantised Qwen3-VL vectors, on a Ray cluster.

Importing this package loads neither torch, ray, lance nor a decoder.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
