"""`mtp report`: one HTML page with figures from the records of runs.

history reads runs; curves, cost and compiled build the sections of the page as data
(content); figures draws; page renders HTML; files writes to a workdir. Only
history and files access the disk.
"""
