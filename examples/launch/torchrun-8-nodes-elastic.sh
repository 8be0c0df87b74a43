#!/bin/bash
# mamba2-hybrid-8b: 4 to 8 nodes × 8 processes, mesh dp_shard 8 × tp 8
# Written by `polylepis launch torchrun`; yours to edit. Run it from the folder where it was written:
#   bash runs/mamba2-hybrid-8b/launch/0001/torchrun.sh ADDRESS head     on the machine that has ADDRESS, which holds the rendezvous
#   bash runs/mamba2-hybrid-8b/launch/0001/torchrun.sh ADDRESS          on each of the others
# The run survives the loss of any machine but the head. A machine that comes back runs the same line again.
set -eo pipefail
export LAUNCH="$PWD"/runs/mamba2-hybrid-8b/launch/0001
export CONFIG="$LAUNCH/config.yaml"
if [ ! -f "$CONFIG" ]; then
  echo "polylepis: $CONFIG is not there: start from the folder where the script was written" >&2
  exit 2
fi
source /opt/polylepis/bin/activate
CPUS=$(env -u OMP_NUM_THREADS nproc)
# torchrun would set 1. All cores of the node, shared among its workers.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CPUS > 8 ? CPUS / 8 : 1))}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# The last collectives of every rank, written when one of them times out.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$LAUNCH/flight-}
# Compiled kernels on the node's own disk: a shared one is slow, and nodes would overwrite each other's files.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}
# tp 8 would like it at 1, but parameters are sharded over dp_shard × cp = 8 and one queue would hold FSDP's
# prefetch back.
# CUDA_DEVICE_MAX_CONNECTIONS is therefore left alone.
# Network interfaces are found by NCCL and Gloo themselves; where they choose wrongly, `polylepis doctor` shows it and
# --env NCCL_SOCKET_IFNAME=… GLOO_SOCKET_IFNAME=… (and NCCL_IB_HCA, NCCL_IB_GID_INDEX) decide.
# The time that torchrun leaves the workers to save when it is told to end; its default of 30 s kills a long save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}
# A progress bar that is written to a file need not move ten times a second.
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-10}
# The code as it was when this was written; and not what happens to lie in the working folder.
export PYTHONPATH="$LAUNCH/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
# Without it a survivor keeps the address of a store that has died, and a machine that comes back is waited for in vain
# (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
HEAD=${1:?the address of the head: bash torchrun.sh ADDRESS [head]}
# Said outright: torchrun compares ADDRESS with the host's own name, which fails where there are several networks, and
# then nobody holds the rendezvous.
if [ "${2:-}" = head ]; then IS_HOST=true; ADDRESS=${LOCAL_ADDR:-$HEAD}; else IS_HOST=false; ADDRESS=${LOCAL_ADDR:-}; fi
# A lost machine is noticed after keep_alive_interval × keep_alive_max_attempt seconds; the rest then wait
# last_call_timeout seconds for it to come back before they go on without it.
exec torchrun --nnodes=4:8 --nproc-per-node=8 --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id=mamba2-hybrid-8b \
  --rdzv-conf="is_host=$IS_HOST,join_timeout=600,last_call_timeout=${LAST_CALL:-30},keep_alive_interval=${KEEP_ALIVE:-5},keep_alive_max_attempt=3" \
  ${ADDRESS:+--local-addr="$ADDRESS"} -m polylepis.pretrain.train "$CONFIG"
