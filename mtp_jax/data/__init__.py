"""From documents to batches: documents -> tokenizers -> store -> loader.

Floor 2 (loader: 3). No jax here: a batch is NumPy until the loop places it.
"""
