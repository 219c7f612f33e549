"""The GPU backend: its layer, its steps, and attention of prompt chunks."""
