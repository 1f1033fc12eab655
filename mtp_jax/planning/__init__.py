"""`mtp plan`: what a run needs, before anybody pays for it. Floor 5.

Reading order: hlo (a compiled program's text) -> ahead (the real step, compiled
for devices that need not be there) -> analytic (bytes and time by formula) ->
report (what is printed: one plan, a sweep, a search).
"""
