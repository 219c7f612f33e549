"""Metrics, traces and demand reports, in gateways and engines."""
