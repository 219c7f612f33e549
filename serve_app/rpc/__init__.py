"""gRPC plumbing: servers, channels, conversions to and from the wire, and watched values."""
