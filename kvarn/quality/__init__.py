"""What a KV cache costs in quality: real engines on real text, against the unquantized cache and against rivals.

`settings` says what to measure, `run` starts one engine a cache format (`quality_worker`) and keeps finished rows,
`divergence` turns logits into numbers, `tasks` makes what engines are fed, `formats` and `simulated` stand in for
caches that this vLLM cannot run, `tables` shows the results.
"""
