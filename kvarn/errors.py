"""The base of every error that a user can act on."""


class KVarNError(Exception):
    """An error that a user can act on; its message says in one sentence what was wrong and what to change."""
