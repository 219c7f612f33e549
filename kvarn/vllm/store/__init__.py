"""A KV connector over a directory that engines of one host share: whole blocks, and the raw first tiles of prefixes."""
