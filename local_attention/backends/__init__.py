"""One module a backend: what it cannot run, what it costs, what it prepares for a problem, and how it runs one.

`why_not(problem)`, `scores(problem)`, `prepare(problem)`,
`run(prepared, q, k, v, key_mask, bias, rel_pos_emb, seed)`.
"""
