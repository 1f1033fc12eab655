#!/usr/bin/env bash
# N processes of one command on this machine, as N machines would run it:
#   source .venv/bin/activate
#   launch/processes.sh [--dry-run] N train|eval [--section.field=VALUE …]
# DEVICES=M gives each of them M virtual CPU devices; PORT is the coordinator's port.
# --dry-run prints what would run.
# SIGTERM and SIGINT are forwarded to all of them; the status is that of process 0.
set -euo pipefail
source "$(dirname "$0")/options.sh"
options '' '' "$@"
set -- "${rest[@]}"
n=${1:-} command=${2:-} devices=${DEVICES:-}
if ! [[ $n =~ ^[1-9][0-9]*$ && $command ]]; then
  die "give N train|eval [--section.field=VALUE …], not: $*"
fi
[[ $devices =~ ^([1-9][0-9]*)?$ ]] || die "DEVICES=$devices: a number"
shift 2
source "$(dirname "$0")/xla_flags.sh" auto
port=${PORT:-$((20000 + RANDOM % 10000))}
prefix=()
if [ "$devices" ]; then
  count=--xla_force_host_platform_device_count=$devices
  # The last flag wins.
  prefix=(env JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$count")
fi
for ((i = n - 1; i >= 0; i--)); do
  process=(
    "${prefix[@]}" python -m mtp_jax "$command" "$@"
    --distributed.coordinator_address="localhost:$port" --distributed.num_processes="$n"
    --distributed.process_id="$i"
  )
  if [ "$dry_run" ]; then echo "$(quoted "${process[@]}") &"; continue; fi
  "${process[@]}" &
done
[ -z "$dry_run" ] || exit 0
first=$!
trap 'signalled=1; kill -TERM $(jobs -p) 2>/dev/null || true' TERM INT
# A signal interrupts `wait`, which then does not return the status of process 0.
while signalled=; status=0; wait "$first" || status=$?; [ -n "$signalled" ]; do :; done
wait
exit "$status"
