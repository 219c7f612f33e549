"""gRPC infrastructure: servers, channels, message conversions, and watched values."""
