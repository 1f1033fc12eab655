#!/usr/bin/env bash
# Fills in launch/jobset.yaml and passes it to kubectl:
#   launch/jobset.sh --name=N --context=C --image=IMAGE \
#     --accelerator=tpu-v5-lite-podslice --topology=4x4 [--slices=2] [--chips=4] \
#     [--spot] [--max-restarts=10] [--grace-s=300] [--service-account=default] \
#     FLAGFILE --data.store=/… --train.workdir=gs://… [--section.field=VALUE …]
# C is a context of kubectl, IMAGE one of launch/Dockerfile; a slice has the chips
# of its topology, --chips of them per machine. --dry-run prints what would run.
# shellcheck disable=SC2154,SC2034  # `options` assigns; used by name
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/options.sh
options 'name context image accelerator topology' \
  'slices=1 chips=4 spot= max_restarts=10 grace_s=300 service_account=default' \
  "$@"
training "${rest[@]}"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
  die "--topology=$topology: chips along each dimension, e.g. 4x4"
all=$((${topology//x/ * }))
if ! [[ $chips =~ ^[1-9][0-9]*$ ]] || ((all % chips)); then
  die "--chips=$chips: a $topology slice has $all, in whole machines"
fi
hosts=$((all / chips))

# YAML reads a JSON string as it is; Kubernetes reads $$ as $.
args='' dollars='$$'
for arg in "${train[@]:1}"; do
  arg=${arg//\\/\\\\} arg=${arg//\"/\\\"} arg=${arg//$'\n'/\\n}
  args+=", \"${arg//\$/$dollars}\""
done

manifest=$(<launch/jobset.yaml)
[ -n "$spot" ] || manifest=$(sed '/gke-spot/d' <<<"$manifest")
for key in name image accelerator topology slices chips hosts max_restarts \
  grace_s service_account; do
  [[ ${!key} =~ ^[A-Za-z0-9._/:@-]+$ ]] || die "--$key=${!key}: no such name"
  manifest=${manifest//"\${$key}"/"${!key}"}
done
manifest=${manifest//'${args}'/"[${args#, }]"}

apply=(kubectl --context="$context" apply -f -)
if [ -n "$dry_run" ]; then
  printf "%s <<'EOF'\n%s\nEOF\n" "$(quoted "${apply[@]}")" "$manifest"
else
  "${apply[@]}" <<<"$manifest"
fi
