#!/usr/bin/env bash
# N processes of one command on this machine, as N machines would run it:
#   source .venv/bin/activate
#   launch/processes.sh N train|eval [--section.field=VALUE …]
# SIGTERM and SIGINT go on to all of them; the status is that of process 0.
set -euo pipefail
n=${1:-} command=${2:-}
if ! [[ $n =~ ^[1-9][0-9]*$ && $command ]]; then
  echo "processes.sh: give N train|eval [--section.field=VALUE …], not: $*" >&2
  exit 2
fi
shift 2
source "$(dirname "$0")/xla_flags.sh" auto
port=${PORT:-$((20000 + RANDOM % 10000))}
for ((i = n - 1; i >= 0; i--)); do
  python -m mtp_jax "$command" "$@" --processes.coordinator="localhost:$port" \
    --processes.count="$n" --processes.index="$i" &
done
first=$!
trap 'asked=1; kill -TERM $(jobs -p) 2>/dev/null || true' TERM INT
# A signal interrupts `wait`: what it then returns is no status of process 0.
while asked=; status=0; wait "$first" || status=$?; [ -n "$asked" ]; do :; done
wait
exit "$status"
