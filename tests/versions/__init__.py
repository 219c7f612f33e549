"""`make versions`: runs the plugin on each vLLM version that it claims, each in a small environment of its own."""
