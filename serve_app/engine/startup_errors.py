"""vLLM's own startup errors, such as a lack of memory, which its core process only prints.

What the quantized cache refuses reaches the caller without this (`kvarn/vllm/hooks/refusals.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STANDARD_ERROR = Path("/proc/self/fd/2")
_ERROR = r"\w+(?:\.\w+)*(?:Error|Exception): (.+)$"
# The last line of the core's traceback; from vLLM 0.31 on only its beginning names the process.
_SAID = re.compile(rf"^\(EngineCore[^)]*\) {_ERROR}|^Process EngineCore(?s:.*?)^{_ERROR}", re.MULTILINE)


@contextmanager
def surfacing_core_errors() -> Iterator[None]:
    """Raise the core's printed error instead of vLLM's reference to it, if stderr is a file, as under Ray.

    Raises:
        RuntimeError: the engine did not start.
    """
    start = _printed_bytes()
    try:
        yield
    except RuntimeError as error:
        said = _SAID.search(_printed_since(start)) if start is not None else None
        if said is None:
            raise
        raise RuntimeError(said[1] or said[2]) from error


def _printed_bytes() -> int | None:
    return _STANDARD_ERROR.stat().st_size if _STANDARD_ERROR.is_file() else None


def _printed_since(start: int) -> str:
    with _STANDARD_ERROR.open("rb") as printed:
        printed.seek(start)
        return printed.read().decode(errors="replace")
