"""`mtp report`: what runs recorded -> one page and its figures. Floor 5.

history reads runs; curves and cost hold what there is to show of them, as data
(content); figures draws; page writes HTML; files puts it all into a workdir.
Only history and files touch the disk.
"""
