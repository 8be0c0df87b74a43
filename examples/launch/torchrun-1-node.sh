#!/bin/bash
# quickstart: 1 node × 2 processes, mesh dp_shard 1 × tp 2
# Written by `polylepis launch torchrun`; yours to edit. Run it from the folder where it was written:
#   bash runs/quickstart/launch/0001/torchrun.sh
set -eo pipefail
export LAUNCH="$PWD"/runs/quickstart/launch/0001
export CONFIG="$LAUNCH/config.yaml"
if [ ! -f "$CONFIG" ]; then
  echo "polylepis: $CONFIG is not there: start from the folder where the script was written" >&2
  exit 2
fi
source /opt/polylepis/bin/activate
CPUS=$(env -u OMP_NUM_THREADS nproc)
# As many threads as `polylepis train` uses, so that the same configuration gives the same bits either way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Network interfaces are found by NCCL and Gloo themselves; where they choose wrongly, `polylepis doctor` shows it and
# --env NCCL_SOCKET_IFNAME=… GLOO_SOCKET_IFNAME=… (and NCCL_IB_HCA, NCCL_IB_GID_INDEX) decide.
# The time that torchrun leaves the workers to save when it is told to end; its default of 30 s kills a long save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}
# A progress bar that is written to a file need not move ten times a second.
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-10}
# The code as it was when this was written; and not what happens to lie in the working folder.
export PYTHONPATH="$LAUNCH/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
exec torchrun --standalone --nproc-per-node=2 --max-restarts=3 \
  -m polylepis.pretrain.train "$CONFIG"
