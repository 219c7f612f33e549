"""OpenAI's HTTP API on top of the gateway's dispatcher."""
