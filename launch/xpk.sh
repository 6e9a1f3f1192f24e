#!/usr/bin/env bash
# A TPU slice on GKE through xpk: the same command in every host's container.
#   CLUSTER=my-cluster TPU=v5litepod-256 IMAGE=gcr.io/my/dexportrait \
#     launch/xpk.sh motion-1 train --config=configs/motion.py:full --workdir=gs://bucket/motion
set -euo pipefail
name="$1"
shift
exec xpk workload create \
  --cluster="${CLUSTER:?name of the GKE cluster}" \
  --workload="$name" \
  --tpu-type="${TPU:?such as v5litepod-256}" \
  --num-slices="${SLICES:-1}" \
  --docker-image="${IMAGE:?image with the package in it}" \
  --max-restarts="${RESTARTS:-100}" \
  --command="dexportrait $*"
