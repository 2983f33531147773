"""One module for each backend: what it cannot run, what it costs, what it prepares for a problem, and how it runs one.

The functions are `why_not(problem)`, `scores(problem)`, `prepare(problem)` and `run(prepared, q, k, v, tensors)`. `run`
returns the output and, if `problem.frame.lse`, the log-sum-exp; `tensors` is the dict of `attend.beside`.
"""
