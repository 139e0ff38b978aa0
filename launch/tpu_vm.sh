#!/usr/bin/env bash
# A training run on a Cloud TPU pod by its VMs: the same command on each host.
#
#   launch/tpu_vm.sh create                      # the pod, and dllm on it
#   launch/tpu_vm.sh train --config=configs/llada_8b.py:v5p:4x4x8 \
#       --config.mesh.fsdp=64 \
#       --workdir=gs://bucket/runs/llada_8b      # returns when it is done
#   launch/tpu_vm.sh delete
#
# TPU_NAME, ZONE, TYPE (such as v5p-128) and VERSION say which pod. Arguments of
# `train` go to `dllm train`. A run that fails is started again, at most
# DLLM_RESTARTS times, and continues from its last complete checkpoint; Ctrl-C
# makes it save and end. The working directory must be one for all hosts: a
# bucket that the VMs' service account may read and write, or Filestore.
set -euo pipefail

name="${TPU_NAME:?set TPU_NAME}"
zone="${ZONE:?set ZONE, for example us-east5-a}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

on_all() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="$1"
}

create() {
  gcloud compute tpus tpu-vm create "$name" --zone="$zone" \
    --accelerator-type="${TYPE:?set TYPE, for example v5p-128}" \
    --version="${VERSION:-v2-alpha-tpuv5}"
  local archive
  archive="$(mktemp -d)/dllm_jax.tar.gz"
  git -C "$here" archive --format=tar.gz --prefix=dllm_jax/ HEAD >"$archive"
  gcloud compute tpus tpu-vm scp "$archive" "$name:" --zone="$zone" --worker=all
  on_all "tar xzf dllm_jax.tar.gz && python3 -m venv dllm &&
    dllm/bin/pip install --quiet -e 'dllm_jax[gcs,tpu]'"
}

train() {
  local arguments restarts="${DLLM_RESTARTS:-20}" attempt=0 status
  printf -v arguments '%q ' "$@"
  trap 'on_all "pkill -TERM -f dllm.train" || true' INT TERM
  while true; do
    status=0
    on_all "cd dllm_jax && ../dllm/bin/dllm train $arguments" || status=$?
    if [[ "$status" -eq 0 || "$status" -eq 2 || "$attempt" -ge "$restarts" ]]
    then
      return "$status"
    fi
    attempt=$((attempt + 1))
    echo "tpu_vm.sh: exit status $status, restart $attempt" >&2
    # A host that hangs would hold its chips.
    on_all "pkill -KILL -f dllm.train" || true
    sleep 10
  done
}

delete() {
  gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet
}

case "${1:-}" in
  create | train | delete) "$@" ;;
  *)
    echo "usage: $0 create | train ARGUMENTS | delete" >&2
    exit 2
    ;;
esac
