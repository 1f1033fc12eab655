"""`mtp plan`: memory and time of a run before it starts.

Reading order: hlo (parses a compiled program; groups and products are parts of it) -> profile
(cycles by scope) -> peak (temporaries at the peak) -> tpu, nvidia (devices that need not be
present, and what a process needs on a GPU) -> ahead (compiles the real step for them) -> analytic
(bytes and time by formula) -> saved (reads a plan's file) -> against (compares two plans) ->
report (prints a plan) -> run (one plan, a sweep or a search).
"""
