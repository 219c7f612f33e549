"""Requests: prompts, sampling parameters, output constraints, and the errors that reject them."""
