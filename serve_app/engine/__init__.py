"""What runs in an engine replica: one vLLM engine and the gRPC service in front of it."""
