"""One self-contained page from the records that `kvarn quality`, `kvarn plan` and `kvarn bench` write."""
