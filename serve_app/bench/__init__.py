"""Load generator for a served model: `kvarn bench serve`."""
