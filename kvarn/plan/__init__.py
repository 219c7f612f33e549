"""Capacity planning from a model's config alone: what fits on which GPU, and about how fast it decodes."""
