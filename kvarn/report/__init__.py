"""One self-contained HTML page from the results of `kvarn quality`, `kvarn plan` and `kvarn bench`."""
