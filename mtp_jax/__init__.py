"""mtp_jax: pretrain language models that predict several tokens at once.

Dimension key. An array's name ends in its letters: `z_BTD`, `logits_BTV`.
  B batch          T query position   S key/cache position   U window, T + K
  D model width    F feed-forward     V vocabulary           L layers
  N attention heads   G key/value heads   R = N / G   H attention-head width
  K prediction heads (future offsets)   C loss chunk   W draft window
  A micro-batches of a step
Attention heads are N and prediction heads are K: "head" alone is always a
prediction head.

Reading order, which is also the direction of imports:
  config, flags, sharding, params -> model/ -> data/ -> loss, optim, checkpoint
  -> train/, evals/ -> report, main.
"""
