"""HTTP server of a gateway, independent of the APIs it serves."""
