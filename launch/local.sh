#!/usr/bin/env bash
# A multi-token model of real code, on this machine, from a fresh clone:
#   launch/local.sh [--section.field=VALUE …]
# Makes .venv, prepares a store from the Python standard library, trains
# experiments/smoke.flags, evaluates it, draws its curves, and lets it go on with
# some code, with head 1 alone and with all its heads, in turn. What is there
# already is used again; other flags get a run of their own.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
store=stores/python-stdlib-bytes
name=smoke
for flag in "$@"; do name+="_${flag#--}"; done
run=runs/$(printf %s "$name" | tr -c 'A-Za-z0-9._=-' '_')

source launch/venv.sh ''
source launch/xla_flags.sh auto
[ -e "$store/manifest.json" ] ||
  mtp prepare --flagfile=experiments/smoke.flags --data.store="$store"
mtp train --flagfile=experiments/smoke.flags --data.store="$store" \
  --train.workdir="$run" "$@"
mtp eval --eval.checkpoint="$run" --out="$run/heldout.json"
mtp report "$run"
prompt='import os

class Path:
    """A path of the file system."""

    def __init__(self, name):
        self.'
mtp generate --decode.checkpoint="$run" --prompt="$prompt" \
  --decode.max_new=128 --decode.compare --out="$run/decode.json"
echo "checkpoints: $run/checkpoints"
echo "metrics:     $run/metrics.jsonl, $run/tensorboard, $run/heldout.json, $run/decode.json"
