"""The parity certificate: which cases were compared on which stack, and how they ended."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from qvl_batch import __version__
from qvl_batch.api.compare import DIFFERENT, CaseResult

_PACKAGES = (
    *("av", "numpy", "pillow", "pypdfium2", "safetensors", "tokenizers"),
    *("torch", "transformers"),
)


def stack_versions() -> dict[str, str]:
    """Return the versions of everything that a vector passes through."""
    return {
        "qvl-batch": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    } | {name: version(name) for name in _PACKAGES}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was compared, and the result.

    ``reference`` says where the expected values come from, with a digest; ``checkpoints`` maps a
    role (``embedding``, ``reranker``) to a digest of the weights. The certificate itself is its
    JSON; `sha256` identifies it.
    """

    reference: str
    checkpoints: Mapping[str, str]
    thresholds: Mapping[str, float]
    cases: tuple[CaseResult, ...]
    versions: Mapping[str, str] = field(default_factory=stack_versions)

    @property
    def holds(self) -> bool:
        return bool(self.cases) and all(case.status != DIFFERENT for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        return {
            "certificate": 1,
            "holds": self.holds,
            "reference": self.reference,
            "checkpoints": dict(self.checkpoints),
            "versions": dict(self.versions),
            "thresholds": dict(self.thresholds),
            "cases": [asdict(case) for case in self.cases],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False)

    @property
    def sha256(self) -> str:
        """sha256 hex of the JSON's UTF-8 bytes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
