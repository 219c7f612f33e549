"""A Ray Serve application that serves vLLM engines over gRPC and HTTP, and routes by KV cache capacity."""
