#!/usr/bin/env bash
# Cloud TPU slices as a queued resource; what runs there runs on all workers.
#   launch/tpu_vm.sh create AT --type=v5litepod-16 \
#     --runtime=v2-alpha-tpuv5-lite [--slices=2] [--spot]
#   launch/tpu_vm.sh status AT      ACTIVE: it is ready
#   launch/tpu_vm.sh setup AT       installs the commit that is checked out here
#   launch/tpu_vm.sh run AT FLAGFILE --data.store=/… --train.workdir=gs://… …
#   launch/tpu_vm.sh logs AT [--node=0] [--worker=0]
#   launch/tpu_vm.sh stop AT        SIGTERM: saves; `run` resumes it
#   launch/tpu_vm.sh delete AT
# AT is --name=N --zone=Z --project=P; --dry-run prints what would run.
# shellcheck disable=SC2154  # `options` assigns
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/options.sh
helped "$@"

action=${1:-} needed='name zone project' optional=
case $action in
  create) needed+=' type runtime' optional='slices=1 spot=' ;;
  logs) optional='node=0 worker=0' ;;
  status | setup | run | stop | delete) ;;
  *) die "give create|status|setup|run|logs|stop|delete, not: $action" ;;
esac
options "$needed" "$optional" "${@:2}"

# tpu VERB ARGS…
tpu() {
  run gcloud compute tpus queued-resources "$@" \
    --zone="$zone" --project="$project"
}
everywhere() {
  tpu ssh "$name" --node=all --worker=all --command="$1"
}

case $action in
  create)
    nodes=(--node-id="$name")
    # gcloud takes a count from 2 on only.
    [ "$slices" = 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
    tpu create "$name" --accelerator-type="$type" \
      --runtime-version="$runtime" "${nodes[@]}" ${spot:+--spot}
    ;;
  status) tpu describe "$name" ;;
  setup)
    archive=build/mtp_jax.tar.gz
    run mkdir -p build
    run git archive --prefix=mtp_jax/ --output="$archive" HEAD
    tpu scp "$archive" "$name:" --node=all --worker=all
    # The images' own Python is older than what the package needs.
    everywhere "set -e; tar xzf mtp_jax.tar.gz; cd mtp_jax;\
 curl -LsSf https://astral.sh/uv/install.sh | sh;\
 ~/.local/bin/uv python install 3.12;\
 PYTHON=\$(~/.local/bin/uv python find --managed-python 3.12);\
 source launch/venv.sh tpu,gcs"
    ;;
  run)
    training "${rest[@]}"
    # It outlives the connection. No loop around it: a slice that was taken away
    # is gone with its machines, and after `stop` nothing shall start again.
    everywhere "cd mtp_jax && source .venv/bin/activate &&\
 source launch/xla_flags.sh tpu &&\
 { nohup $(quoted "${train[@]}") >mtp.log 2>&1 </dev/null & echo \$! >mtp.pid; }"
    ;;
  logs)
    tpu ssh "$name" --node="$node" --worker="$worker" \
      --command='tail -n 100 -f mtp_jax/mtp.log'
    ;;
  stop) everywhere 'kill -TERM "$(cat mtp_jax/mtp.pid)"' ;;
  delete) tpu delete "$name" --force ;;
esac
