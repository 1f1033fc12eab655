# Sourced: XLA flags that overlap communication with computation, and on a GPU the share of its
# memory that JAX allocates.
#   source launch/xla_flags.sh auto|tpu|gpu|cpu
# auto detects the devices of this machine. Flags already in XLA_FLAGS (GPU) or
# LIBTPU_INIT_ARGS (TPU) are kept, as is a share of memory; on a CPU nothing is set.
# Names: MaxText, benchmarks/xla_flags_library.py (TPU); JAX, GPU performance
# tips, https://docs.jax.dev/en/latest/gpu_performance_tips.html (GPU).

# add_flags VARIABLE FLAG=VALUE …: prepends flags to the variable, except those that it
# has already.
add_flags() {
  local variable=$1 flag new=
  shift
  for flag in "$@"; do
    case " ${!variable:-}" in
      *" --${flag%%=*}="* | *" --${flag%%=*} "* | *" --${flag%%=*}") ;;
      *) new+="--$flag " ;;
    esac
  done
  new+=${!variable:-}
  export "$variable=${new% }"
}

platform=${1:-auto} dev=${dev:-/dev}
if [ "$platform" = auto ]; then
  platform=cpu
  if nvidia-smi -L >/dev/null 2>&1; then
    platform=gpu
  elif compgen -G "$dev/accel*" >/dev/null ||
    compgen -G "$dev/vfio/[0-9]*" >/dev/null; then
    platform=tpu
  fi
fi
case $platform in
  tpu)
    add_flags LIBTPU_INIT_ARGS \
      xla_tpu_enable_latency_hiding_scheduler=true \
      xla_enable_async_all_gather=true \
      xla_enable_async_all_reduce=true \
      xla_enable_async_collective_permute=true \
      xla_tpu_enable_async_all_to_all=true \
      xla_tpu_enable_async_collective_fusion=true \
      xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
      xla_tpu_enable_async_collective_fusion_multiple_steps=true \
      xla_tpu_overlap_compute_collective_tc=true \
      xla_tpu_enable_data_parallel_all_reduce_opt=true \
      xla_tpu_data_parallel_opt_different_sized_ops=true
    ;;
  gpu)
    add_flags XLA_FLAGS \
      xla_gpu_enable_latency_hiding_scheduler=true \
      xla_gpu_enable_highest_priority_async_stream=true \
      xla_gpu_enable_pipelined_all_gather=true \
      xla_gpu_enable_pipelined_reduce_scatter=true \
      xla_gpu_enable_pipelined_all_reduce=true
    # JAX's own 0.75 leaves 20 GiB of an H100 unused. The rest holds the CUDA context, NCCL's
    # buffers and cuBLAS's workspace, with a quarter to spare: mtp_jax/planning/nvidia.py.
    # JAX refuses to have both of its variables.
    [ "${XLA_CLIENT_MEM_FRACTION:-}" ] ||
      export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
    ;;
  cpu) ;;
  *)
    echo "xla_flags.sh: auto, tpu, gpu or cpu, not: $platform" >&2
    exit 2
    ;;
esac
unset platform dev
