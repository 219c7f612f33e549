"""Reading and writing the JSON result files of benchmarks and quality runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvarn.errors import KVarNError


class ResultFileError(KVarNError):
    """A result file cannot be written."""


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Replace a result file atomically: readers see, and a full disk leaves, either the old or the new one.

    Raises:
        ResultFileError: the disk is full, or the directory is not writable.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(results, indent=1) + "\n")
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ResultFileError(
            f"{path} cannot be written: {error.strerror}; its previous content is kept"
        ) from None
