"""From documents to batches. Read in this order:

documents (readers), tokenizers, vocabulary (a trained one), encoding (texts to
tokens, in processes), spool, shards, store (what prepare writes), corpus (what
a run opens), windows, loader (batches).

Floor 2 (loader: 3). No jax here: a batch is NumPy until the loop places it.
"""
