"""The gateway's HTTP server, below any API."""
