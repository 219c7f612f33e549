"""Engine replica: one vLLM engine and the gRPC service in front of it."""
