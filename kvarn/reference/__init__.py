"""Ground truth of the KVarN cache in plain fp32 torch, one stage per file (arXiv 2606.03458).

`hadamard` rotates, `variance_norm` balances, `rtn` rounds, `codec` folds the scales and packs records, `attention`
reads them back. Every faster implementation is tested against these.
"""
