"""Capacity planning from a model's config alone: what fits on a GPU, and its approximate decode speed."""
