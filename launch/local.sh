#!/usr/bin/env bash
# Trains a multi-token-prediction model of code on this machine, from a fresh clone:
#   launch/local.sh [--processes=N[xM]] [--dry-run] [--section.field=VALUE …]
# Makes .venv, prepares a store from the Python standard library, trains
# experiments/smoke.flags, evaluates it, writes its report, and compares plain with
# speculative decoding of some code. Existing outputs are reused; other flags have a
# run directory of their own. --processes trains in N processes, of M virtual CPU
# devices each; --dry-run prints what would run.
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/options.sh
helped "$@"
store=stores/python-stdlib-bytes
name=smoke dry_run='' processes='' flags=() train=(mtp train)
for flag; do
  case $flag in
    --dry-run) dry_run=yes ;;
    --processes=*) processes=${flag#*=} ;;
    *) flags+=("$flag") name+="_${flag#--}" ;;
  esac
done
run=runs/$(printf %s "$name" | tr -c 'A-Za-z0-9._=-' '_')

if [ -n "$processes" ]; then
  [[ $processes =~ ^[1-9][0-9]*(x[1-9][0-9]*)?$ ]] ||
    die "--processes=$processes: give N or NxM"
  train=(launch/processes.sh "${processes%x*}" train)
  [[ $processes != *x* ]] || train=(env DEVICES="${processes#*x}" "${train[@]}")
fi
[ -n "$dry_run" ] || source launch/venv.sh ''
source launch/xla_flags.sh auto
[ -e "$store/manifest.json" ] ||
  run mtp prepare --flagfile=experiments/smoke.flags --data.store="$store"
run "${train[@]}" --flagfile=experiments/smoke.flags --data.store="$store" \
  --train.workdir="$run" "${flags[@]}"
run mtp eval "$run" --out="$run/heldout.json"
run mtp report "$run"
prompt='import os

class Path:
    """A path of the file system."""

    def __init__(self, name):
        self.'
# Greedy, so small a model repeats itself.
run mtp generate "$run" --prompt="$prompt" --decode.max_new_tokens=128 \
  --decode.temperature=0.7 --decode.num_draft_tokens=all --out="$run/decode.json"
[ -z "$dry_run" ] || exit 0
echo "checkpoints: $run/checkpoints"
echo "report:      $run/report.html"
echo "metrics:     $run/metrics.jsonl, $run/tensorboard, $run/heldout.json, $run/decode.json"
