"""Acceptance of the package on a machine with a GPU or a TPU; see __main__.py."""
