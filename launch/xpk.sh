#!/usr/bin/env bash
# A TPU slice on GKE through xpk: the same command in every host's container.
#   CLUSTER=my-cluster TPU=v5litepod-16 IMAGE=gcr.io/my/dexportrait \
#     launch/xpk.sh motion-1 train --config=configs/motion.py:full --distributed=on \
#     --workdir=/mnt/bucket/motion --config.data.path=/mnt/bucket/faces \
#     --config.data.batch_size=32 --config.mesh.fsdp=16
# Paths are mounted ones (a disk, or a bucket through its driver), not gs://. Mesh data x fsdp must divide the sources
# of a batch: 28 in motion.py:full, 12 in animator_image.py:full, 8 in animator_video.py:full, whose 24 frames mesh
# context can share. A slice that was preempted, or ended with code 75 (stopped and saved), is started again up to
# RESTARTS times.
set -euo pipefail
name="$1"
shift
exec xpk workload create \
  --cluster="${CLUSTER:?name of the GKE cluster}" \
  --workload="$name" \
  --tpu-type="${TPU:?such as v5litepod-16}" \
  --num-slices="${SLICES:-1}" \
  --docker-image="${IMAGE:?image with the package in it}" \
  --max-restarts="${RESTARTS:-100}" \
  --command="dexportrait $(printf '%q ' "$@")"
