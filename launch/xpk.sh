#!/usr/bin/env bash
# A workload on the TPU slices of a GKE cluster, by xpk (pip install xpk):
#   launch/xpk.sh --name=N --cluster=C --project=P --zone=Z --type=v5litepod-16 \
#     --image=IMAGE [--slices=2] [--spot] [--max-restarts=100] [--grace-s=300] \
#     FLAGFILE --data.store=/… --train.workdir=gs://… [--section.field=VALUE …]
# IMAGE is one of launch/Dockerfile; --dry-run prints what would run.
# `xpk workload list` and `xpk workload delete` list and delete it.
# shellcheck disable=SC2154  # `options` assigns
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/options.sh
options 'name cluster project zone type image' \
  'slices=1 spot= max_restarts=100 grace_s=300' "$@"
training "${rest[@]}"

# xpk restarts by default what a signal killed (127 and above), i.e. what did not save
# in time; 75 is what did. 76 and 77 must not be restarted.
# `exec`: xpk sends SIGTERM to the shell that it runs the command in.
run xpk workload create --workload="$name" --cluster="$cluster" \
  --project="$project" --zone="$zone" --tpu-type="$type" \
  --num-slices="$slices" --docker-image="$image" ${spot:+--spot} \
  --max-restarts="$max_restarts" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds="$grace_s" \
  --command="source launch/xla_flags.sh tpu && exec $(quoted "${train[@]}")"
