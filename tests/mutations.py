"""Faults that the tests must notice: data for tests/mutants.py.

Most are mistakes that other trainers of several future tokens made; each is one
line, and runs without an error.
"""

from typing import NamedTuple

MISTAKES = {
  0: 'another',
  1: '1 shift off by one',
  2: '2 filling trained as token 0',
  3: '3 targets across documents',
  4: '4 accumulation mixes means and sums',
  5: "5 divided by another head's count",
  6: '6 no target gives 0 / 0',
  7: '7 evaluation is another loss',
  8: '8 all logits alive at once',
  9: '9 acceptance is label accuracy',
  10: '10 head weights dropped or kept silently',
  11: '11 auxiliary loss beside what is returned',
  12: '12 log-sum-exp in bfloat16',
  13: '13 unembedding gathered once a head',
  14: '14 heads keep rejected keys and values',
  15: '15 rolled RoPE positions',
  16: '16 summed losses of different n compared',
}


class Fault(NamedTuple):
  name: str
  mistake: int  # of MISTAKES
  file: str
  old: str  # occurs exactly once
  new: str
  tests: tuple[str, ...]  # node ids, as few as should notice


SCORES = 'mtp_jax/evals/scores.py'
LOSS, TARGETS = 'mtp_jax/loss.py', 'mtp_jax/targets.py'
ENTROPY, STEP = 'mtp_jax/cross_entropy.py', 'mtp_jax/train/step.py'
HEADS, LOOP = 'mtp_jax/model/heads.py', 'mtp_jax/train/loop.py'
LOADER, WINDOWS = 'mtp_jax/data/loader.py', 'mtp_jax/data/windows.py'
OPTIM, PARAMS = 'mtp_jax/optim.py', 'mtp_jax/params.py'
ATTENTION, HLO = 'mtp_jax/model/attention.py', 'mtp_jax/plan/hlo.py'
SPECULATIVE = 'mtp_jax/decode/speculative.py'
SAMPLE = 'mtp_jax/decode/sample.py'
MAPPING, FOLDER = 'mtp_jax/interop/mapping.py', 'mtp_jax/interop/folder.py'
LLAMA_CPP = 'mtp_jax/interop/llama_cpp.py'
BY_HAND = 'test_the_files_alone_draft_what_the_model_drafts'
BEGIN, TOKENS = 'mtp_jax/train/begin.py', 'mtp_jax/interop/tokens.py'


def _in(file: str, *names: str) -> tuple[str, ...]:
  return tuple(f'tests/{file}_test.py::{name}' for name in names)


def _oracle(row):
  return _in('loss', f'test_equals_oracle[{row}]')


# Eager, packed, on a mesh, with z-loss, leaps and the order of tokens.
ORACLE = _oracle(
  'sequential-3-shared-True-0:1,.3-0.01-3-0.7-eager-0-1-(1,4,2)-block'
)
CHUNKS = _oracle(
  'recursive-3-shared-False-0:1-0.01-3-0.7-eager-4-1-(1,1,1)-none'
)
CUT = _in('optim', 'test_a_step_does_not_depend_on_how_it_is_cut')
LEDGER = _in('plan/hlo', 'test_a_program_of_a_tpu_by_hand')


def _text(family):
  name = f'test_greedy_text_is_that_of_float64[{family}-4]'
  return _in('decode/speculative', name)


def _drafts(family):
  name = f'test_drafts_are_what_the_heads_say[{family}-widths1]'
  return _in('decode/speculative', name)


def _distribution(row):
  name = f'test_speculation_keeps_the_distribution[{row}]'
  return _in('decode/sample', name)


TREE_TEXT = _in(
  'decode/speculative',
  'test_a_deep_tree_changes_nothing_but_the_pace[parallel]',
)
STOPS = _in(
  'decode/speculative', 'test_perfect_drafts_all_stand_and_stops_cut_them'
)


def _forward(family):
  name = f'test_forward_equals_oracle[{family}-4]'
  return _in('model/lm', name)


FAULTS = (
  # What is predicted, and from where.
  Fault(
    'target-shift', 1, TARGETS,
    "rows['tokens'][:, there]", "rows['tokens'][:, :T]",
    _in('loss', 'test_targets_on_a_periodic_sequence'),
  ),
  Fault(
    'reads-its-target', 1, 'mtp_jax/model/lm.py',
    'cfg.heads.stride * (k - 2)', 'cfg.heads.stride * (k - 1)',
    ORACLE,
  ),
  Fault(
    'sees-a-token-ahead', 1, 'mtp_jax/model/attention.py',
    't[:, None] >= t[None, :]', 't[:, None] + 1 >= t[None, :]',
    _in('model/lm', 'test_no_head_sees_past_what_it_may[parallel-1]'),
  ),
  Fault(
    'padding-is-text', 2, LOADER,
    'if row < n_windows:',
    'position_ABU[place] = np.arange(seq_len + span)\n    if row < n_windows:',
    _in('data/loader', 'test_eval_reads_each_window_once_and_pads'),
  ),
  Fault(
    'no-mask', 3, TARGETS,
    'position_BU[:, there] == position_BU[:, :T] + offset',
    'position_BU[:, there] >= 0',
    _in('loss', 'test_targets_never_cross_a_document'),
  ),
  Fault(
    'mask-of-later-positions', 3, TARGETS,
    'position_BU[:, there] == position_BU[:, :T] + offset',
    'position_BU[:, there] > position_BU[:, :T]',
    _in('loss', 'test_targets_never_cross_a_document'),
  ),
  Fault(
    'order-across-documents', 3, TARGETS,
    '(valid_BT & first_BT)', 'first_BT',
    ORACLE,
  ),
  Fault(
    'order-of-every-occurrence', 0, TARGETS,
    '(valid_BT & first_BT)', 'valid_BT',
    ORACLE,
  ),
  Fault(
    'attends-across-documents', 3, 'mtp_jax/model/attention.py',
    'segment_BT[:, :, None] == segment_BT[:, None, :]',
    'segment_BT[:, :, None] >= segment_BT[:, None, :]',
    _in('model/lm', 'test_a_packed_document_is_read_as_if_alone[parallel]'),
  ),
  Fault(
    'position-of-the-window', 3, WINDOWS,
    'position_U - np.maximum.accumulate(begin_U)', 'position_U',
    _in('data/windows', 'test_valid_targets_stay_in_their_document'),
  ),
  # Sums and counts.
  Fault(
    'accumulation-divides-twice', 4, STEP,
    's + x.astype(s.dtype)', 's + x.astype(s.dtype) / cfg.train.accumulate',
    CUT,
  ),
  Fault(
    'count-of-a-micro-batch', 4, LOSS,
    'over_K = 1 / jnp.maximum(count_K, 1)[:m]',
    'over_K = 1 / jnp.maximum(jnp.sum(valid_KBT, axis=(1, 2)), 1)[:m]',
    _in('loss', 'test_micro_batches_of_unequal_counts_sum_exactly'),
  ),
  Fault(
    'trunk-hears-one-head', 4, LOSS,
    'dz_BTD + d_BTD.astype(dz_BTD.dtype)', 'd_BTD.astype(dz_BTD.dtype)',
    CUT,
  ),
  Fault(
    'chunks-overwrite', 4, ENTROPY,
    'return dunembed + d, (', 'return d, (',
    CHUNKS,
  ),
  Fault(
    'count-of-head-1', 5, LOSS,
    'over_K = 1 / jnp.maximum(count_K, 1)[:m]',
    'over_K = jnp.ones(m) / jnp.maximum(count_K, 1)[0]',
    _in('loss', 'test_a_head_is_divided_by_its_own_count'),
  ),
  Fault(
    'count-of-all-positions', 5, TARGETS,
    'count_K = jnp.sum(valid_AKBT, axis=(0, 2, 3))',
    'count_K = jnp.sum(valid_AKBT | True, axis=(0, 2, 3))',
    _in('loss', 'test_counts_and_bytes'),
  ),
  Fault(
    'zero-by-zero', 6, LOSS,
    'over_K = 1 / jnp.maximum(count_K, 1)[:m]',
    'over_K = 1 / count_K[:m]',
    _in('loss', 'test_batch_without_a_target_gives_zero_and_finite_gradients'),
  ),
  Fault(
    'evaluation-unweighted', 7, 'mtp_jax/evals/heldout.py',
    "np.sum(weight_K * total['loss_sum_K'] * over_K)",
    "np.sum(total['loss_sum_K'] * over_K)",
    _in('evals/heldout',
        'test_several_batches_are_one_and_equal_the_training_loss'),
  ),
  Fault(
    'evaluation-of-all-heads', 7, 'mtp_jax/evals/heldout.py',
    'n_active = config.active_heads(cfg, last)', 'n_active = n',
    _in('evals/heldout',
        'test_heads_and_weights_in_force_at_the_last_step[parallel]'),
  ),
  Fault(
    'bits-of-all-heads', 16, 'mtp_jax/train/metrics.py',
    "nats = metrics['loss_sum_K'][0] - metrics['z_loss_sum_K'][0]",
    "nats = np.sum(metrics['loss_sum_K'] - metrics['z_loss_sum_K'])",
    _in('train/loop', 'test_a_run_writes_what_it_says'),
  ),
  # The loss and its schedules.
  Fault(
    'heads-at-once', 8, LOSS,
    '_, ((loss_K, stats, order_K), _) = heads.walk(\n'
    '    head, z_BTD, w.modules, of_heads, cfg\n'
    '  )',
    '(loss_K, stats, order_K), _ = jax.vmap(lambda *x: head('
    'heads.step, z_BTD, *x)[1])(w.modules, of_heads)',
    _in('loss', 'test_memory_is_flat_in_the_number_of_heads[remat]'),
  ),
  Fault(
    'acceptance-of-labels', 9, LOSS,
    'stats.argmax_BT, jnp.all(',
    'stats.argmax_BT.at[0].set(targets_KBT[0]), jnp.all(',
    _oracle('residual-3-tied-True-0:1,.3-0.01-3-0.0-remat-4-1-(1,1,1)-dots'),
  ),
  Fault(
    'acceptance-unshifted', 9, TARGETS,
    'argmax_KBT[0, :, checked : checked + Q]', 'argmax_KBT[0, :, :Q]',
    _in('loss',
        'test_acceptance_is_agreement_with_head_1_not_label_accuracy'),
  ),
  Fault(
    'z-loss-untrained', 11, ENTROPY,
    '(of.lse_BC - of.label_BC)) + z_loss',
    '(of.lse_BC - of.label_BC)) + jax.lax.stop_gradient(z_loss)',
    ORACLE,
  ),
  Fault(
    'z-loss-outside', 11, ENTROPY,
    '(of.lse_BC - of.label_BC)) + z_loss', '(of.lse_BC - of.label_BC))',
    _in('loss', 'test_z_loss_is_reported_apart_and_inside'),
  ),
  Fault(
    'z-loss-unsquared', 0, ENTROPY,
    'jnp.sum(valid_BC * of.lse_BC**2)', 'jnp.sum(valid_BC * of.lse_BC)',
    ORACLE,
  ),
  Fault(
    'low-log-sum-exp', 12, ENTROPY,
    'lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)',
    'lse_BC = jax.nn.logsumexp(logits_BCV.astype(h_BCD.dtype), axis=-1)'
    '.astype(jnp.float32)',
    _in('loss', 'test_the_log_sum_exp_of_one_token_is_float32'),
  ),
  Fault(
    'gathers-once-a-head', 13, LOSS,
    '  unembed_DV = shared.unembed_DV',
    '  unembed_DV = gather_shared(w.norm_D, w.unembed, w.order_VD, cfg)'
    '.unembed_DV',
    _in('loss',
        'test_the_unembedding_is_gathered_once_not_once_a_head[remat-parallel]'),
  ),
  Fault(
    'eager-ignores-its-cotangent', 0, LOSS,
    '(dtotal * g).astype(g.dtype)', 'g',
    _in('loss',
        'test_a_multiple_of_the_loss_has_a_multiple_of_the_gradient[parallel]'),
  ),
  Fault(
    'weights-a-step-late', 0, TARGETS,
    'step >= starts_P', 'step > starts_P',
    _in('loss', 'test_weights_by_step'),
  ),
  Fault(
    'norms-of-heads-unsquared', 0, LOSS,
    'jnp.sum(dz_BTD.astype(jnp.float32) ** 2)',
    'jnp.sum(dz_BTD.astype(jnp.float32))',
    _in('loss', 'test_head_gradient_norms_are_those_of_each_head_alone'
        '[parallel-remat]'),
  ),
  Fault(
    'reduces-in-compute-dtype', 0, 'mtp_jax/sharding.py',
    'dw.astype(grad_dtype), at_rest', 'dw.astype(compute_dtype), at_rest',
    _in('loss',
        'test_gradients_are_reduced_over_devices_in_grad_dtype[float32-remat]'),
  ),
  Fault(
    'sums-in-parameter-dtype', 0, STEP,
    'jnp.promote_types(x.dtype, cfg.loss.grad_dtype)', 'x.dtype',
    _in('optim', 'test_many_micro_batches_are_not_rounded_away'),
  ),
  # The families.
  Fault(
    'rolled-rope', 15, HEADS,
    'block.block(layer(module), y_BTD, ctx, cfg)',
    'block.block(layer(module), y_BTD, ctx._replace('
    'sin=jnp.roll(ctx.sin, -1, 1), cos=jnp.roll(ctx.cos, -1, 1)), cfg)',
    _forward('parallel'),
  ),
  Fault(
    'rope-wavelengths', 15, 'mtp_jax/model/layers.py',
    'm.rope_theta ** (-i / m.head_width)',
    'm.rope_theta ** (-2 * i / m.head_width)',
    _forward('parallel'),
  ),
  Fault(
    'anticausal-is-causal', 0, HEADS,
    '_leave_chain, dependent=True, reverse=True',
    '_leave_chain, dependent=True',
    _forward('anticausal'),
  ),
  Fault(
    'residual-normed-after', 0, HEADS,
    'y_BTD + jax.nn.silu(w_BTD)',
    'norm(y_BTD + jax.nn.silu(w_BTD), x.norm_D, cfg)',
    _forward('residual'),
  ),
  Fault(
    'embedding-at-position-0', 0, HEADS,
    'ctx.position_BT > 0', 'ctx.position_BT >= 0',
    _forward('sequential'),
  ),
  Fault(
    'normed-twice-in-a-chain', 0, HEADS,
    'return y_BTD, norm(y_BTD, module.final_norm, cfg)',
    'return (norm(y_BTD, module.final_norm, cfg),) * 2',
    _forward('recursive'),
  ),
  # The update.
  Fault(
    'norms-decay', 0, PARAMS,
    'return self.std is not None', 'return len(self.shape) > 1',
    _in('model/lm', 'test_decay_is_read_from_the_spec_not_from_dimensions'),
  ),
  Fault(
    'one-head-too-many', 0, OPTIM,
    '< in_use[name]', '<= in_use[name]',
    _in('optim', 'test_inactive_heads_move_in_nothing'),
  ),
  Fault(
    'betas-exchanged', 0, OPTIM,
    'o.b1, o.b2, o.eps', 'o.b2, o.b1, o.eps',
    _in('optim', 'test_two_updates_are_adamw_by_hand'),
  ),
  Fault(
    'moments-of-parameters-dtype', 0, OPTIM,
    'return transform(cfg).init(',
    'return (lambda w: transform(cfg).init(jax.tree.map('
    'lambda x: x.astype(cfg.model.param_dtype), w)))(',
    _in('optim', 'test_four_dtypes'),
  ),
  Fault(
    'one-learning-rate', 0, OPTIM,
    '(lr * rate) * d', 'lr * d',
    _in('optim', 'test_two_updates_of_two_groups_are_adamw_by_hand'),
  ),
  Fault(
    'rounds-towards-zero', 0, OPTIM,
    'jnp.uint32) + noise', 'jnp.uint32) + 0 * noise',
    _in('optim', 'test_a_number_is_rounded_to_a_neighbour_and_on_average_not'),
  ),
  Fault(
    'decay-starts-late', 0, OPTIM,
    '[last - o.decay_steps]', '[last]',
    _in('optim', 'test_learning_rate'),
  ),
  Fault(
    'overflow-is-a-step', 0, STEP,
    'jnp.isfinite(total) & jnp.isfinite(grad_norm)', 'jnp.isfinite(total)',
    _in('train/loop',
        'test_a_non_finite_step_changes_nothing_and_too_many_end_the_run'),
  ),
  # Data, the loop, and what is kept.
  Fault(
    'every-process-reads-the-first-rows', 0, LOADER,
    'rows_B.reshape(accumulate, -1)[:, columns]',
    'rows_B.reshape(accumulate, -1)'
    '[:, : len(np.arange(batch_size // accumulate)[columns])]',
    _in('data/loader', 'test_processes_share_one_order'),
  ),
  Fault(
    'micro-batches-interleaved', 0, LOADER,
    'rows_B.reshape(accumulate, -1)', 'rows_B.reshape(-1, accumulate).T',
    _in('data/loader', 'test_accumulate_is_a_reshape'),
  ),
  Fault(
    'window-without-targets', 0, WINDOWS,
    'np.maximum(size_S - span, 0)', 'size_S',
    _in('data/windows', 'test_windows_are_those_counted_by_hand'),
  ),
  Fault(
    'held-out-is-trained', 0, 'mtp_jax/data/store.py',
    "'train': order_M[~valid_M]", "'train': order_M",
    _in('data/store', 'test_round_trip'),
  ),
  Fault(
    'curriculum-a-step-early', 0, LOOP,
    'config.active_heads(cfg, done - 1)', 'config.active_heads(cfg, done)',
    _in('train/loop', 'test_a_curriculum_leaves_inactive_heads_alone'),
  ),
  Fault(
    'resumes-at-the-first-batch', 0, LOOP,
    'train_batches(tokens, cfg, start', 'train_batches(tokens, cfg, 0',
    _in('train/loop', 'test_records_past_the_checkpoint_are_cut_off'),
  ),
  Fault(
    'keeps-a-record-twice', 0, 'mtp_jax/train/metrics.py',
    "r['step'] <= start_step", "r['step'] <= start_step + 1",
    _in('train/metrics', 'test_what_is_past_the_start_is_cut_off'),
  ),
  Fault(
    'checkpoint-drops-a-head', 10, 'mtp_jax/checkpoint.py',
    'ocp.args.StandardSave(state)',
    "ocp.args.StandardSave(jax.tree_util.tree_map_with_path(lambda p, x: 0 * x"
    " if 'heads' in jax.tree_util.keystr(p) else x, state))",
    _in('checkpoint', 'test_the_parameters_alone'),
  ),
  Fault(
    'oldest-checkpoint', 0, 'mtp_jax/checkpoint.py',
    'sorted(int(name) for name in names if name.isdigit())',
    '[int(name) for name in sorted(names) if name.isdigit()]',
    _in('checkpoint', 'test_find'),
  ),
  Fault(
    'writes-without-the-lock', 0, 'mtp_jax/train/lock.py',
    "return bool(holder) and holder['run'] == self._id", 'return bool(holder)',
    _in('train/loop', 'test_who_lost_the_lock_writes_nothing_more[cadence0]'),
  ),
  # Kernels, chunks, counts.
  Fault(
    'kernel-across-documents', 3, ATTENTION,
    'segment_ids=segments', 'segment_ids=None',
    _in('model/attention', 'test_a_kernel_is_the_reference'),
  ),
  Fault(
    'kernel-unscaled', 0, ATTENTION,
    '(q_BTNH * H**-0.5, k_BSGH, v_BSGH)', '(q_BTNH, k_BSGH, v_BSGH)',
    _in('model/attention', 'test_a_kernel_is_the_reference'),
  ),
  Fault(
    'chunk-of-all-devices', 8, ENTROPY,
    '/ batch / size', '/ size',
    _in('loss', 'test_chunks_unless_told_hold_half_a_gib_of_logits_a_device'),
  ),
  Fault(
    'chain-without-its-cross-entropy', 4, LOSS,
    'jnp.sum(h_BTD * dh_BTD,', 'jnp.sum(h_BTD * jnp.sign(dh_BTD),',
    ORACLE,
  ),
  Fault(
    'attention-counted-whole', 0, 'mtp_jax/flops.py',
    'cfg.data.seq_len / 2 if causal', 'cfg.data.seq_len if causal',
    _in('flops', 'test_four_heads_over_one_as_published'),
  ),
  # What is planned.
  Fault(
    'loops-counted-once', 0, HLO, 'times * n, n, loops', 'times, n, loops',
    LEDGER,
  ),
  Fault(
    'chains-counted-thrice', 0, HLO,
    '(c.chain, c.loops) if c.chain else len(found)', 'len(found)',
    LEDGER,
  ),
  Fault(
    'all-reduce-sent-once', 0, HLO,
    "'all-reduce': 2 * share", "'all-reduce': share",
    LEDGER,
  ),
  Fault(
    'slices-read-whole', 0, HLO,
    'total += user.result_bytes', 'total += size',
    _in('plan/hlo', 'test_a_loop_over_slices_reads_the_whole_once'),
  ),
  Fault(
    'fits-without-its-state', 0, 'mtp_jax/plan/ahead.py',
    'return held + self.temp_bytes', 'return self.temp_bytes',
    _in('plan/plan', 'test_the_devices_here'),
  ),
  Fault(
    'largest-becomes-sum', 0, 'mtp_jax/plan/report.py',
    'step_s = max(roofline.values(), default=None)',
    'step_s = sum(roofline.values()) or None',
    _in('plan/plan', 'test_roofline_divides_by_the_peaks'),
  ),
  Fault(
    'ratio-upside-down', 0, 'mtp_jax/bench.py',
    'a / b / by for', 'b / a / by for',
    _in('bench', 'test_ratios_of_a_comparison'),
  ),
  # Decoding.
  Fault(
    'drafts-stay-in-the-cache', 14, SPECULATIVE,
    'return max(self.window - 2, 0) * heads',
    'return 0 * heads',
    _drafts('sequential'),
  ),
  Fault(
    'heads-see-what-fell', 14, SPECULATIVE,
    'jnp.arange(S)[None, None] <= position_BT',
    'jnp.arange(S)[None, None] < 2 + position_BT',
    _drafts('parallel'),
  ),
  Fault(
    'the-trunk-sees-what-fell', 14, SPECULATIVE,
    'seen_BMS = slot_11S <= position_BM',
    'seen_BMS = slot_11S < 2 + position_BM',
    _text('parallel'),
  ),
  Fault(
    'positions-of-the-window-rolled', 15, SPECULATIVE,
    'position_BM = root_B1 + jnp',
    'position_BM = 1 + root_B1 + jnp',
    _text('causal'),
  ),
  Fault(
    'what-is-fed-is-the-tokens-own', 1, SPECULATIVE,
    'jnp.maximum(position_BT + k - 1, 0)',
    'jnp.maximum(position_BT + k - 2, 0)',
    _drafts('recursive'),
  ),
  Fault(
    'branches-see-each-other', 0, SPECULATIVE,
    '|= mask_MM[np.array(parents)]',
    '|= True',
    TREE_TEXT,
  ),
  Fault(
    'the-path-is-not-kept', 14, SPECULATIVE,
    'cache_lib.move(kv, from_BW, to_BW)',
    'cache_lib.move(kv, to_BW, to_BW)',
    TREE_TEXT,
  ),
  Fault(
    'a-stop-is-left-out', 0, SPECULATIVE,
    '1 + jnp.argmax(stops_BW',
    'jnp.argmax(stops_BW',
    STOPS,
  ),
  Fault(
    'rows-go-on-after-a-stop', 0, SPECULATIVE,
    'new_B = jnp.where(live_B, new_B, 0)',
    'new_B = new_B',
    STOPS,
  ),
  Fault(
    'rejected-draws-from-p', 0, SAMPLE,
    'jnp.where(rejected_B1, rest_BV, p_BV)',
    'p_BV',
    _distribution('plain-bad'),
  ),
  Fault(
    'accepts-too-often', 0, SAMPLE,
    'u_BJ * q_BJ < p_BJ',
    'u_BJ * q_BJ < 1.3 * p_BJ',
    _distribution('plain-bad'),
  ),
  Fault(
    'drafts-of-an-unknown-distribution', 0, SPECULATIVE,
    'q_BJV = q_BJV.at[:, of_heads].set(q_BKV)',
    'q_BJV = q_BJV + 0.2',
    _distribution('plain-good'),
  ),
  Fault(
    'top-p-without-the-last', 0, SAMPLE,
    'before < s.top_p',
    'before + p < s.top_p',
    _in('decode/sample', 'test_filters_equal_ranking_one_by_one[top_p]'),
  ),
  Fault(
    'one-seed-for-all-rows', 0, SAMPLE,
    'jax.random.key(seed)',
    'jax.random.key(0 * seed)',
    _in('decode/sample', 'test_a_row_does_not_depend_on_its_neighbours'),
  ),
  Fault(
    'export-without-further-heads', 10, MAPPING,
    'for k in range(2, n + 1):', 'for k in range(2, n):',
    _in('interop/hf', 'test_every_parameter_has_a_place'),
  ),
  Fault(
    'surplus-key-of-an-export', 10, FOLDER,
    'if found.keys() != wanted.keys():', 'if wanted.keys() - found.keys():',
    _in('interop/hf', 'test_a_surplus_or_missing_key_is_an_error'),
  ),
  Fault(
    'export-not-read-again', 10, FOLDER,
    'if files.digest(np.array(tensor.read())) != wanted[name]:', 'if False:',
    _in('interop/hf', 'test_what_was_written_is_read_again'),
  ),
  Fault(
    'import-leaves-a-key', 10, FOLDER,
    "(found.keys() - wanted.keys(), 'has no place in this model'),", '',
    _in('interop/hf', 'test_what_does_not_fit_is_told'),
  ),
  Fault(
    'copies-not-compared', 10, FOLDER,
    'if not np.array_equal(place.form.out(ours, cfg), found[name].read()):',
    'if False:',
    _in('interop/forms', 'test_a_copy_that_differs_is_told'),
  ),
  Fault(
    'rope-of-meta-not-permuted', 0, MAPPING,
    'return _heads_out(w_DNHP.reshape(D, N, H), cfg)',
    'return _heads_out(w_DNH, cfg)',
    _in('interop/forms', 'test_plain_torch_computes_the_same[meta-shared]'),
  ),
  Fault(
    'embedding-second-in-transformers-mtp', 0, MAPPING,
    'return np.concatenate(np.split(w_ED, 2)[::-1])', 'return w_ED',
    _in(
      'interop/forms',
      'test_plain_torch_computes_the_same[transformers_mtp-shared]',
    ),
  ),
  Fault(
    'projection-of-modules-not-transposed', 0, MAPPING,
    'lambda w, _: _swapped(w).T, lambda w, _: _swapped(w.T), TRANSPOSED.shape',
    'lambda w, _: _swapped(w.T), lambda w, _: _swapped(w).T, TRANSPOSED.shape',
    _in('interop/engines', f'{BY_HAND}[transformers_mtp-sequential]'),
  ),
  Fault(
    'norms-of-modules-swapped', 10, MAPPING,
    "transformers_mtp='hnorm', gguf_mtp='nextn.hnorm',",
    "transformers_mtp='enorm', gguf_mtp='nextn.enorm',",
    _in('interop/engines', f'{BY_HAND}[transformers_mtp-sequential]'),
  ),
  Fault(
    'final-norm-is-that-of-the-embedding', 10, MAPPING,
    "transformers_mtp='shared_head.norm', gguf_mtp='nextn.shared_head_norm',",
    "transformers_mtp='shared_head.norm', gguf_mtp='nextn.enorm',",
    _in(
      'interop/forms', 'test_names_are_those_of_the_program[gguf-sequential]'
    ),
  ),
  Fault(
    'embedding-second-in-gguf', 10, MAPPING,
    "gguf_mtp=('nextn.eh_proj', EMBEDDING_FIRST),",
    "gguf_mtp='nextn.eh_proj',",
    _in('interop/engines', f'{BY_HAND}[gguf-sequential]'),
  ),
  Fault(
    'hidden-state-second-in-mimo', 10, MAPPING,
    "'proj', TRANSPOSED, hf='proj', mimo='input_proj',",
    "'proj', TRANSPOSED, hf='proj', mimo=('input_proj', EMBEDDING_FIRST),",
    _in('interop/engines', f'{BY_HAND}[mimo-recursive]'),
  ),
  Fault(
    'last-step-without-a-module', 0, MAPPING,
    'for j in range(1, cfg.heads.n - 1)', 'for j in range(1, cfg.heads.n - 2)',
    _in(
      'interop/forms',
      'test_names_are_those_of_the_program[transformers_mtp-recursive]',
    ),
  ),
  Fault(
    'rope-of-a-plain-gguf-not-permuted', 10, MAPPING,
    "gguf=('attn_q', HEADS_IN_PAIRS), gguf_mtp='attn_q',",
    "gguf='attn_q', gguf_mtp='attn_q',",
    _in('interop/engines', 'test_a_plain_gguf_computes_the_same'),
  ),
  Fault(
    'queries-after-keys', 0, LLAMA_CPP,
    "APART, FUSED = ('attn_q', 'attn_k', 'attn_v'), 'attn_qkv'",
    "APART, FUSED = ('attn_k', 'attn_q', 'attn_v'), 'attn_qkv'",
    _in('interop/forms', 'test_there_and_back_is_the_same[float32-gguf-'
        'sequential-shared]'),
  ),
  Fault(
    'rope-frequencies-upside-down', 10, LLAMA_CPP,
    'layers.rope_rates(plain.model) / layers.rope_rates(cfg.model)',
    'layers.rope_rates(cfg.model) / layers.rope_rates(plain.model)',
    _in('interop/engines', 'test_a_plain_gguf_computes_the_same'),
  ),
  Fault(
    'index-names-a-heads-tensor', 0, FOLDER,
    'weight_map |= dict.fromkeys(names, name)',
    "weight_map |= dict.fromkeys([*names, 'mtp_heads.2.proj.weight'], name)",
    _in('interop/hf', 'test_an_index_names_the_llama_alone'),
  ),
  Fault(
    'lengths-of-a-gguf-believed', 10, LLAMA_CPP,
    'if n > len(self.data) - self.at:', 'if False:',
    _in('interop/engines', 'test_a_damaged_file_is_refused_in_a_line'),
  ),
  Fault(
    'unembeddings-beyond-the-blocks', 10, MAPPING,
    "if h.unembedding == 'replicated' and modules < h.n - 1:", 'if False:',
    _in(
      'interop/engines',
      'test_a_recursive_module_has_one_unembedding_in_llama_cpp',
    ),
  ),
  Fault(
    'pieces-that-join-to-a-special-one', 0, LLAMA_CPP,
    'if names.issuperset(cut):', 'if False:',
    _in(
      'interop/engines', 'test_pieces_that_join_to_a_special_one_are_refused'
    ),
  ),
  Fault(
    'normed-states-imported-as-raw', 0, 'mtp_jax/interop/hf.py',
    "if kind == 'llama_mtp' and about.get('tie_last_hidden_states', True):",
    "if kind == 'llama_mtp' and about.get('tie_last_hidden_states', False):",
    _in('interop/engines', 'test_modules_that_read_normed_states_are_not_'
        'imported'),
  ),
  Fault(
    'several-modules-in-mimo', 10, MAPPING,
    "if form == 'mimo' and (several := heads_lib.n_modules(cfg, h.n)) > 1:",
    "if form == 'mimo' and (several := heads_lib.n_modules(cfg, h.n)) > 9:",
    _in('interop/forms', 'test_what_a_form_has_no_place_for'),
  ),
  Fault(
    'first-row-of-every-shard', 0, FOLDER,
    'row[...] = ours(of_index[i], tuple(rest))',
    'row[...] = ours(of_index[rows[0]], tuple(rest))',
    _in('interop/hf', 'test_options_come_back_too'),
  ),
  Fault(
    'merges-by-worst-score', 0, TOKENS,
    'found.sort(key=lambda m: (-score[m[0]],',
    'found.sort(key=lambda m: (score[m[0]],',
    _in('interop/tokens', 'test_transformers_gives_the_same_ids[bpe]'),
  ),
  Fault(
    'head-1-is-the-first-layer', 0, BEGIN,
    'parts, done = [jax.tree.map(lambda w: w[-1:], layers)], 1',
    'parts, done = [jax.tree.map(lambda w: w[:1], layers)], 1',
    _in('train/begin', 'test_the_next_token_stays_and_so_do_heads_of_the_family'
        '[parallel-linear]'),
  ),
  Fault(
    'kept-heads-one-off', 0, BEGIN,
    'lambda w: w[done : done + more], old.heads',
    'lambda w: w[:more], old.heads',
    _in('train/begin', 'test_the_next_token_stays_and_so_do_heads_of_the_family'
        '[causal-causal]'),
  ),
  Fault(
    'chain-the-wrong-way-round', 0, BEGIN,
    'lambda w: w[: -own - 1 : -1], layers', 'lambda w: w[-own:], layers',
    _in('train/begin', 'test_the_next_token_stays_and_so_do_heads_of_the_family'
        '[anticausal-linear]'),
  ),
  Fault(
    'frozen-trunk-moves', 0, OPTIM,
    "trunk = 0 if frozen == 'trunk' else cfg.optim.trunk_lr",
    'trunk = cfg.optim.trunk_lr',
    _in('train/begin', 'test_a_frozen_trunk_stays_bit_for_bit'),
  ),
  Fault(
    'scores-of-what-is-no-target', 7, SCORES,
    'Scores(*found, valid_KBT[:m])',
    'Scores(*found, jnp.ones_like(valid_KBT[:m]))',
    _in('evals/scores', 'test_sums_are_those_of_the_loss'),
  ),
  Fault(
    'rank-of-equals', 0, SCORES,
    'ids_11V < target_BC[:, :, None]', 'ids_11V > target_BC[:, :, None]',
    _in('evals/scores', 'test_ranks_by_hand'),
  ),
  Fault(
    'sure-of-the-target', 0, SCORES,
    'jnp.exp(of.top_BC - of.lse_BC)', 'jnp.exp(of.label_BC - of.lse_BC)',
    _in('evals/scores', 'test_ranks_by_hand'),
  ),
  Fault(
    'calibration-of-top-5', 0, 'mtp_jax/evals/calibration.py',
    'by_bin((s.rank == 0)', 'by_bin((s.rank < TOP)',
    _in('evals/calibration', 'test_sums_are_those_of_single_scores'),
  ),
  Fault(
    'induction-off-by-one', 1, 'mtp_jax/evals/induction.py',
    'row.argmax[0, p] == item.ids[p + 1]', 'row.argmax[0, p] == item.ids[p]',
    _in('evals/induction', 'test_a_token_is_scored_where_it_is_predicted'),
  ),
  Fault(
    'choice-points-off-by-one', 1, 'mtp_jax/evals/choice_points.py',
    'nats_KU[k, places_T + offset]', 'nats_KU[k, places_T + offset - 1]',
    _in('evals/induction', 'test_nats_stand_at_the_token_they_are_of'),
  ),
  Fault(
    'samples-share-seeds', 0, 'mtp_jax/evals/subject.py',
    "f'{of_run} {prompt} {sample}'", "f'{of_run} {prompt + sample}'",
    _in('evals/subject',
        'test_each_sample_of_each_prompt_has_a_seed_of_its_own'),
  ),
  Fault(
    'stop-kept', 0, 'mtp_jax/evals/subject.py',
    'text[: min(found)], True', 'text[: max(found)], True',
    _in('evals/subject', 'test_cut_at_the_first_of_the_stops'),
  ),
  Fault(
    'answer-by-its-beginning', 0, 'mtp_jax/evals/synthetic.py',
    'said == item.answer', 'item.answer.startswith(said)',
    _in('evals/synthetic', 'test_an_answer_is_right_as_a_whole'),
  ),
  Fault(
    'test-items-trained-on', 0, 'mtp_jax/data/tasks.py',
    'if question(found.prompt) not in held_out:', 'if found.prompt:',
    _in('data/tasks', 'test_no_test_item_is_trained_on'),
  ),
  Fault(
    'test-graphs-in-another-order', 0, 'mtp_jax/data/tasks.py',
    "'|'.join(sorted(edges.split('|')))", 'edges',
    _in('data/tasks',
        'test_no_graph_of_the_test_is_trained_on_in_another_order'),
  ),
  Fault(
    'items-drawn-again-dropped', 0, 'mtp_jax/data/spool.py',
    'if document.drawn:', 'if document.cuts and not document.text:',
    _in('data/tasks', 'test_an_item_that_is_drawn_again_is_no_duplicate'),
  ),
  Fault(
    'equal-items-in-both-splits', 0, 'mtp_jax/data/spool.py',
    'named[:24] + found[24:]', 'named',
    _in('data/tasks', 'test_an_item_that_is_drawn_again_is_no_duplicate'),
  ),
  Fault(
    'last-document-left-out', 0, 'mtp_jax/data/windows.py',
    'offset_M[:].tolist(), [tokens.size]', 'offset_M[:].tolist()',
    _in('data/windows', 'test_documents_are_all_there'),
  ),
  Fault(
    'evaluation-of-the-beginning', 0, 'mtp_jax/data/loader.py',
    'row_B * n // n_read', 'row_B',
    _in('data/loader', 'test_eval_of_few_batches_is_spread_over_the_split'),
  ),
  Fault(
    'composition-the-other-way', 0, 'mtp_jax/data/tasks.py',
    'value = _multiply(value, g, p)', 'value = _multiply(value, f, p)',
    _in('data/tasks', 'test_polynomials_are_evaluated_anew'),
  ),
  Fault(
    'acceptance-on-training-text', 0, 'mtp_jax/evals/acceptance.py',
    '.split(cfg.eval.split)', ".split('train')",
    _in('evals/acceptance',
        'test_pieces_are_held_out_beginnings_then_what_follows'),
  ),
  Fault(
    'pass-at-k-biased', 0, 'mtp_jax/evals/code.py',
    'return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))',
    'return 1.0 - (1.0 - c / n) ** k',
    _in('evals/code',
        'test_pass_at_k_is_the_share_of_draws_with_a_right_answer'),
  ),
  Fault(
    'level-of-another-test-trained', 0, 'mtp_jax/data/tasks.py',
    "tests(of, N_TESTS, ('test', 'train'))", 'tests(of, N_TESTS)',
    _in('data/tasks', 'test_no_test_item_is_trained_on'),
  ),
  Fault(
    'piece-without-a-target', 0, 'mtp_jax/evals/acceptance.py',
    'if piece.size > P', 'if piece.size >= P',
    _in('evals/acceptance',
        'test_pieces_are_held_out_beginnings_then_what_follows'),
  ),
  Fault(
    'first-documents-alone', 0, 'mtp_jax/evals/induction.py',
    'while len(items) < limit and', 'while not items and',
    _in('evals/induction',
        'test_the_first_items_are_of_as_many_documents_as_there_are'),
  ),
  Fault(
    'choice-points-of-all-tokens', 0, 'mtp_jax/evals/choice_points.py',
    'asked.sum() / n_both)', 'asked.mean())',
    _in('evals/induction', 'test_choice_points_by_hand'),
  ),
  Fault(
    'one-suite-in-the-report', 0, 'mtp_jax/report.py',
    "values.setdefault('suites', {})[label] = found",
    "values['suites'] = {label: found}",
    _in('evals/induction', 'test_through_the_command_line'),
  ),
  # Data and interop.
  Fault(
    'shard-not-checked', 0, 'mtp_jax/data/shards.py',
    'if now != self._stamp or len(data)', 'if len(data)',
    _in('data/store',
        'test_a_file_that_changes_while_it_is_read_is_named[tokens-zeroed]'),
  ),
  Fault(
    'descriptor-per-shard', 0, 'mtp_jax/data/shards.py',
    '@functools.lru_cache(OPEN_FILES)', '@functools.lru_cache(None)',
    _in('data/store', 'test_many_shards_take_few_descriptors'),
  ),
  Fault(
    'shards-of-one-size', 0, 'mtp_jax/data/store.py',
    '-(-int(spool.length_M.sum()) // MAX_SHARDS)', '0',
    _in('data/store', 'test_shards_grow_with_the_store'),
  ),
  Fault(
    'offsets-of-one-block', 0, 'mtp_jax/data/windows.py',
    'while stop == BLOCK and', 'while False and',
    _in('data/windows',
        'test_offsets_between_are_those_of_a_whole_search[5000-2]'),
  ),
  Fault(
    'merged-over-the-place', 0, 'mtp_jax/data/splitting.py',
    "not in inside\n", "not in inside or True\n",
    _in('data/splitting',
        'test_parts_have_the_tokens_of_the_whole[trained]'),
  ),
  Fault(
    'space-before-each-part', 0, 'mtp_jax/data/encoding.py',
    'tokenizer.encode(part.before + part.text))[n:]',
    'tokenizer.encode(part.text))',
    _in('data/splitting',
        'test_parts_have_the_tokens_of_the_whole[llama-2]'),
  ),
  Fault(
    'cut-of-parts-lost', 0, 'mtp_jax/data/spool.py',
    'begun_cuts + tuple(begun + at for', 'begun_cuts + tuple(at for',
    _in('data/splitting', 'test_a_spool_of_parts_is_that_of_documents[bytes]'),
  ),
  Fault(
    'unigram-in-parts', 0, 'mtp_jax/data/splitting.py',
    'about.ModelType.Name(about.model_type) not in kinds', 'False',
    _in('data/splitting', 'test_what_is_not_known_has_no_rule[unigram]'),
  ),
  Fault(
    'sum-of-parts-lost', 0, 'mtp_jax/data/unigram.py',
    'return self._known(found_T), score',
    'return self._known(found_T), np.float32(0)',
    _in('data/unigram', 'test_parts_have_the_ids_of_the_whole[lossless]'),
  ),
  Fault(
    'match-over-the-place', 0, 'mtp_jax/data/regexes.py',
    'q.looks_ahead or q.accepts(after)', 'q.looks_ahead',
    _in('data/splitting', 'test_parts_have_the_tokens_of_the_whole[llama-3]'),
  ),
  Fault(
    'large-file-held', 0, 'mtp_jax/data/documents.py',
    'if how.whole or (not packed', 'if True or (not packed',
    _in('data/documents', 'test_a_large_file_is_read_in_blocks'),
  ),
  Fault(
    'size-is-the-number-of-tokens', 0, 'mtp_jax/data/tokenizers.py',
    'size = 1 + max(fast.get_vocab().values(), default=-1)',
    'size = fast.get_vocab_size()',
    _in('data/models', 'test_a_vocabulary_ends_after_its_largest_id'),
  ),
  Fault(
    'one-end-token-exported', 0, 'mtp_jax/interop/hf.py',
    'list(tokenizer.stop_ids) if several else', '',
    _in('interop/files', 'test_all_end_tokens_come_in_and_leave'),
  ),
  Fault(
    'one-end-token-stops', 0, 'mtp_jax/data/tokenizers.py',
    'return (self.eos, *self.more_eos)', 'return (self.eos,)',
    _in('data/models', 'test_all_end_tokens_are_read_beside_the_file'),
  ),
  Fault(
    'stale-shard-wins', 0, 'mtp_jax/interop/files.py',
    'return {name: tensors[file][name] for name, file in file_of.items()}',
    'return {k: x for file in tensors.values() for k, x in file.items()}',
    _in('interop/files', 'test_the_index_says_which_file_a_tensor_is_from'),
  ),
  Fault(
    'overlap-imported', 0, 'mtp_jax/interop/files.py',
    'if begin < end:\n      raise wrong', 'if False:\n      raise wrong',
    _in('interop/files', 'test_offsets_that_cannot_be_are_refused'),
  ),
  Fault(
    'nan-imported', 0, 'mtp_jax/interop/files.py',
    '(array.view(np.uint16) & 0x7F80) == 0x7F80',
    '(array.view(np.uint16) & 0x7F80) == 0xFF80',
    _in('interop/files', 'test_weights_that_are_no_numbers_are_refused'),
  ),
  Fault(
    'head-of-a-tied-model-dropped', 0, FOLDER,
    'if head and not np.array_equal(', 'if False and not np.array_equal(',
    _in('interop/files', 'test_a_tied_config_with_another_head_is_refused'),
  ),
  Fault(
    'invented-answer-wins', 0, 'mtp_jax/evals/gsm8k.py',
    'SAYS.split(text, maxsplit=1)', 'SAYS.split(text)[-2:]',
    _in('evals/gsm8k', 'test_the_number_of_a_solution'),
  ),
  Fault(
    'sweeps-the-living', 0, 'mtp_jax/paths.py',
    'if int(found[1]) != os.getpid() and _lives(int(found[1])):', 'if False:',
    _in('data/store', 'test_what_a_killed_process_left_is_swept'),
  ),
  # What training loses, or says, where something is missing or interrupted.
  Fault(
    'mean-over-nothing-is-0', 6, 'mtp_jax/train/metrics.py',
    'return float(total / count) if count else None',
    'return float(total / max(count, 1))',
    _in('train/metrics', 'test_a_mean_over_nothing_is_no_number'),
  ),
  Fault(
    'no-target-is-a-good-step', 0, STEP,
    'jnp.any(count_K[:n_active] > 0),', 'jnp.any(count_K[:n_active] >= 0),',
    _in('train/loop',
        'test_a_step_without_a_target_passes_by_the_non_finite_counter'),
  ),
  Fault(
    'nothing-is-a-loss-of-0', 0, 'mtp_jax/train/spikes.py',
    'if not self._sigma or loss is None or', 'loss = loss or 0.0\n    if',
    _in('train/goodput', 'test_a_detector_passes_by_what_is_no_loss'),
  ),
  Fault(
    'detector-forgets', 0, LOOP,
    'checkpoint.spikes(t.workdir, start) if start else {}', '{}',
    _in('train/goodput', 'test_a_signal_does_not_change_what_is_left_out'),
  ),
  Fault(
    'goes-back-to-an-interruption', 0, LOOP,
    'and checkpoint.is_at_cadence(step, cfg.train)', '',
    _in('train/goodput', 'test_a_signal_does_not_change_what_is_left_out'),
  ),
  Fault(
    'evaluation-forgotten', 0, LOOP,
    'and not _missing(cfg, tokens, start):', ':',
    _in('train/loop', 'test_a_signal_ends_an_evaluation_which_the_same_command'
        '_makes_up_for'),
  ),
  Fault(
    'evaluated-before-it-is-saved', 0, LOOP,
    '          if not due:\n            _save(',
    '          if False:\n            _save(',
    _in('train/loop', 'test_a_signal_ends_an_evaluation_which_the_same_command'
        '_makes_up_for'),
  ),
  Fault(
    'named-and-not-evaluated', 0, LOOP,
    '(suites_too and registry.HELDOUT in names)', 'False',
    _in('train/loop', 'test_a_suite_that_is_named_is_evaluated'),
  ),
  Fault(
    'a-terminal-closes', 0, 'mtp_jax/processes.py',
    '(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)',
    '(signal.SIGTERM, signal.SIGINT)',
    _in('train/loop',
        'test_a_signal_then_the_same_command_is_the_undisturbed_run'),
  ),
  Fault(
    'last-step-before-the-end', 0, OPTIM,
    'steps - o.warmup_steps - 1', 'steps - o.warmup_steps',
    _in('optim', 'test_the_last_step_is_at_the_end_of_the_schedule'),
  ),
  Fault(
    'half-a-copy-is-good', 0, 'mtp_jax/checkpoint.py',
    "        _read_arrays(path / 'state')", '        pass',
    _in('checkpoint', 'test_a_copy_that_broke_off_is_not_good'),
  ),
  Fault(
    'saved-unseen', 0, 'mtp_jax/checkpoint.py',
    'why = unreadable(self._folder / str(step))', "why = ''",
    _in('checkpoint', 'test_what_cannot_be_opened_again_is_not_saved'),
  ),
  Fault(
    'workdir-taken-for-a-step', 0, 'mtp_jax/checkpoint.py',
    'if not there and asked.parent.name', 'if asked.parent.name',
    _in('checkpoint', 'test_a_workdir_may_be_called_as_a_step_is'),
  ),
  Fault(
    'containers-share-a-lock', 0, 'mtp_jax/train/lock.py',
    "and holder.get('machine', _machine()) == _machine()", '',
    _in('train/lock',
        'test_another_container_of_the_same_host_name_is_waited_for'),
  ),
  Fault(
    'clock-ahead-is-waited-for', 0, 'mtp_jax/train/lock.py',
    'max(silent_s, 0)', 'silent_s',
    _in('train/lock',
        'test_a_lock_of_a_clock_that_is_ahead_is_waited_for_as_long'),
  ),
  Fault(
    'silent-by-our-clock-is-dead', 0, 'mtp_jax/train/lock.py',
    'max(STALE_S - max(silent_s, 0), LIVES_S)', 'STALE_S - max(silent_s, 0)',
    _in('train/lock',
        'test_one_silent_for_long_by_our_clock_is_watched_for_a_while'),
  ),
  Fault(
    'figures-of-others-go', 0, 'mtp_jax/run_report/files.py',
    'for name in {*before} - {*pngs}:',
    'for name in {p.name for p in of.glob("*.png")} - {*pngs}:',
    _in('run_report', 'test_figures_of_others_stay'),
  ),
  Fault(
    'whole-gradients-over-all', 0, 'mtp_jax/sharding.py',
    'dw = jax.reshard(dw, P(*at_rest, unreduced=others))\n', '\n',
    _in('plan/hlo', 'test_gradients_are_scattered_over_fsdp_and_only_shards'
        '_added_over_data'),
  ),
  Fault(
    'axes-in-parts', 0, 'mtp_jax/plan/hlo.py',
    'int(part or sizes[axis])', 'int(sizes[axis])',
    _in('plan/hlo', 'test_groups_are_read_in_every_form'),
  ),
  # Input checks and the sandbox.
  Fault(
    'true-read-as-a-number', 0, 'mtp_jax/jsonl.py',
    'return type(value) is int and -(2**63)',
    'return isinstance(value, int) and -(2**63)',
    _in('config', 'test_json_of_a_wrong_type_names_the_field'),
  ),
  Fault(
    'unknown-field-read', 0, 'mtp_jax/jsonl.py',
    'if field not in fields and ... not in form:', 'if field is None:',
    _in('manifest', 'test_a_damaged_manifest'),
  ),
  Fault(
    'line-break-in-a-message', 0, 'mtp_jax/jsonl.py',
    'c if c.isprintable() else', "c if c.isprintable() or c == '\\n' else",
    _in('config', 'test_a_refusal_is_one_line_of_bounded_length'),
  ),
  Fault(
    'number-without-a-limit', 0, 'mtp_jax/config.py',
    "'added to the root of the second moment', above=0, max=1",
    "'added to the root of the second moment', above=0",
    _in('config', 'test_every_number_has_limits'),
  ),
  Fault(
    'manifest-names-the-parent', 0, 'mtp_jax/paths.py',
    "    and '..' not in path.parts\n", '',
    _in('manifest', 'test_a_manifest_names_files_of_its_folder_only'),
  ),
  Fault(
    'store-of-files-elsewhere', 0, 'mtp_jax/data/shards.py',
    "if not paths.is_within(record['file']):", 'if not record:',
    _in('data/store', 'test_a_manifest_of_a_wrong_type_names_the_field'),
  ),
  Fault(
    'flag-file-cycle-unseen', 0, 'mtp_jax/flags.py',
    'if real in seen:', 'if real in seen[:0]:',
    _in('flags', 'test_a_file_may_be_included_twice_but_not_by_itself'),
  ),
  Fault(
    'default-of-the-mesh-blamed', 0, 'mtp_jax/validate.py',
    'rest.sort(key=lambda axis: getattr(default, axis) == -1)', 'rest.sort()',
    _in('config',
        'test_what_is_refused_names_the_flag_that_was_given'),
  ),
  Fault(
    'weights-after-the-end', 0, 'mtp_jax/validate.py',
    'if step < cfg.train.steps', 'if step >= 0',
    _in('config',
        'test_what_is_refused_names_the_flag_that_was_given'),
  ),
  Fault(
    'newer-checkpoint-read', 0, 'mtp_jax/checkpoint.py',
    "if saved['format'] != FORMAT:", "if saved['format'] < FORMAT:",
    _in('checkpoint',
        'test_about_of_another_program_or_type_is_one_line'),
  ),
  Fault(
    'flag-without-a-use-ignored', 0, 'mtp_jax/main.py',
    'if given and text not in COMMANDS[name].sections:',
    "if given and name == 'train' and text != 'prompt':",
    _in('main', 'test_a_flag_without_a_use_is_refused'),
  ),
  Fault(
    'tests-can-be-written', 0, 'mtp_jax/evals/keeper.py',
    '  fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)\n', '',
    _in('evals/sandbox', 'test_what_is_handed_over_stays_as_it_is'),
  ),
  Fault(
    'netlink-open', 0, 'mtp_jax/evals/filter.py',
    'FAMILIES = 1, 2, 10 ', 'FAMILIES = 1, 2, 10, 16 ',
    _in('evals/sandbox',
        'test_sockets_of_the_host_and_calls_without_a_use'),
  ),
  Fault(
    'echo-of-the-token-passes', 0, 'mtp_jax/evals/keeper.py',
    "return 'passed' if said == self._token[::-1] else 'forged'",
    "return 'passed' if said in (self._token, self._token[::-1]) else 'forged'",
    _in('evals/sandbox', 'test_what_a_pass_is_worth'),
  ),
  Fault(
    'output-of-all-samples-kept', 0, 'mtp_jax/evals/code.py',
    "return ended._replace(out='')", 'return ended',
    _in('evals/code', 'test_calls_of_apps'),
  ),
  Fault(
    'successor-swept', 0, 'mtp_jax/train/lock.py',
    ' and not os.path.lexists(self._path)', '',
    _in('train/lock', 'test_nothing_of_a_successor_is_removed'),
  ),
  Fault(
    'touched-by-writes-alone', 0, 'mtp_jax/train/lock.py',
    '        self.check()\n', '        pass\n',
    _in('train/lock', 'test_a_run_is_alive_however_long_a_step_takes'),
  ),
  Fault(
    'older-ones-go-unseen', 0, 'mtp_jax/checkpoint.py',
    'max(t.keep_last, 2)', 't.keep_last',
    _in('checkpoint',
        'test_the_one_before_stays_until_the_newest_was_opened'),
  ),
  Fault(
    'rollback-into-the-spike', 0, 'mtp_jax/checkpoint.py',
    '3 if t.checkpoint_every == 1 else 2', '2',
    _in('checkpoint',
        'test_interruptions_push_out_no_checkpoint_of_a_rollback'),
  ),
  Fault(
    'after-an-added-token', 0, 'mtp_jax/data/splitting.py',
    'last.isdisjoint((before, before.casefold()))', 'True',
    _in('data/splitting',
        'test_parts_have_the_tokens_of_the_whole[prefix-after-token]'),
  ),
  Fault(
    'within-an-added-token', 0, 'mtp_jax/data/splitting.py',
    'inner.isdisjoint(\n      (after, after.casefold())\n    )', 'True',
    _in('data/splitting',
        'test_parts_have_the_tokens_of_the_whole[upper-case-tokens]'),
  ),
  Fault(
    'signal-after-the-look', 0, 'mtp_jax/processes.py',
    '    self._interrupts = True  # before the look, or one between were not'
    ' heard\n    try:\n      self.check()\n',
    '    self.check()\n    self._interrupts = True\n    try:\n',
    _in('processes', 'test_a_signal_right_after_the_look_is_heard'),
  ),
  Fault(
    'lost-in-a-jitted-collective', 0, 'mtp_jax/processes.py',
    'isinstance(error, ValueError) and _STATUS.match(first)', 'False',
    _in('processes', 'test_the_end_of_another_is_a_line'),
  ),
)  # fmt: skip
