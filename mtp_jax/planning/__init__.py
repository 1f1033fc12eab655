"""`mtp plan`: memory and time of a run before it starts.

Reading order: hlo (parses a compiled program; groups and products are parts of it) -> nvidia
(GPUs, and what a process needs on them) -> ahead (compiles the real step for devices that need
not be present) -> analytic (bytes and time by formula) -> report (prints one plan, a sweep or
a search).
"""
