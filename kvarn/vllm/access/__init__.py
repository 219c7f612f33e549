"""What the rest of the project uses of vLLM beyond its public API."""
