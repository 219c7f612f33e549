"""Who may call: certificates, API keys, limits, and what a caller's identity becomes inside."""
