"""A Ray Serve application that serves vLLM engines over gRPC and routes by what their KV caches can hold."""
