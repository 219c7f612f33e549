"""Benchmarks that anyone can run again: one command each, with a table to read and JSON to keep."""
