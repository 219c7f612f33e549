"""Measures a served model under load: `kvarn bench serve`."""
