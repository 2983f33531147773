"""One module a backend: `why_not(problem)`, `prepare(problem)` and `run(constants, q, k, v, key_mask, bias, rel_pos_emb, seed)`."""
