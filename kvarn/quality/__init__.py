"""Quality cost of KV cache formats: real engines on real text, against the unquantized cache and rivals.

`settings` configures a run, `run` starts one engine per cache format (`quality_worker`, `measure`) and keeps finished
rows, `tasks` and `conversations` generate prompts, `divergence` and `recalls` compute metrics, `formats` and
`simulated` emulate caches that this vLLM cannot run, `tables` and `charts` present the results.
"""
