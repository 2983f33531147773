"""One module a backend: what it cannot run, what it costs, what it prepares for a problem, and how it runs one.

`why_not(problem)`, `scores(problem)`, `prepare(problem)`, `run(prepared, q, k, v, tensors)`, which returns the output
and, where `problem.lse`, the log-sum-exp; `tensors` are those of `attend.beside`.
"""
