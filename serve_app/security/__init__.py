"""Authentication, TLS, rate limits, and isolation of tenants."""
