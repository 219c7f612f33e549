"""The error that vLLM's core process prints as it fails to start, in every form that a tested version prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.engine import startup_errors
from serve_app.engine.startup_errors import surfacing_core_errors

SENTENCE = "1.0 GiB KV cache is needed, which is larger than the available KV cache memory (0.5 GiB)."
PREFIXED = f"""(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7)   File "core.py", line 1, in run
(EngineCore pid=7) ValueError: {SENTENCE}
"""
BARE = f"""Process EngineCore:
Traceback (most recent call last):
  File "core.py", line 1, in run
    raise ValueError(
ValueError: {SENTENCE}
"""
BEFORE = "ValueError: of something else\n"


def start_engine(stderr: Path, printed: str) -> None:
    """Fail as vLLM does: the core prints its error, the caller gets a reference to it."""
    with surfacing_core_errors():
        with stderr.open("a") as file:
            file.write(printed)
        raise RuntimeError("Engine core initialization failed. See root cause above.")


@pytest.mark.parametrize("printed", [PREFIXED, BARE], ids=["prefixed", "bare"])
def test_the_printed_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    stderr = tmp_path / "stderr"
    stderr.write_text(BEFORE)
    monkeypatch.setattr(startup_errors, "_STANDARD_ERROR", stderr)
    with pytest.raises(RuntimeError) as raised:
        start_engine(stderr, "WARNING: slow\n" + printed)
    assert str(raised.value) == SENTENCE


def test_without_a_printed_error_vllms_own_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = tmp_path / "stderr"
    stderr.write_text(BEFORE)
    monkeypatch.setattr(startup_errors, "_STANDARD_ERROR", stderr)
    with pytest.raises(RuntimeError, match="See root cause above"):
        start_engine(stderr, "WARNING: slow\n")
