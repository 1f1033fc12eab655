"""The data pipeline, from documents to batches. Reading order:

documents (readers), chat (conversations), tokenizers, vocabulary (trains one), encoding (text to
tokens, in worker processes), spool, shards, store (the output of mtp prepare),
corpus (the stores of a run), windows, loader (batches), batches (those of a
Config).

Only batches.py imports jax: a batch is NumPy until the training loop places it.
"""
