"""The name of a shared store, by which gateways see which engines share it."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

FILE = "id"  # in the store's directory; what an engine on another node, or in another container, reads, too


def store_id(directory: Path) -> str:
    """Return the name of the store in `directory`, made with it; "" if it cannot be read or made."""
    file, draft = directory / FILE, directory / f"{FILE}.{uuid.uuid4().hex}"
    with suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not file.exists():
            draft.write_text(uuid.uuid4().hex)
            with suppress(FileExistsError):  # another engine was faster
                os.link(draft, file)
            draft.unlink()
        return file.read_text()
    return ""
