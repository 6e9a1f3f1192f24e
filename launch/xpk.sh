#!/usr/bin/env bash
# A TPU slice on GKE through xpk: the same command in every host's container.
#   CLUSTER=my-cluster TPU=v5litepod-16 IMAGE=gcr.io/my/dexportrait \
#     launch/xpk.sh motion-1 train --config=configs/motion.py:full@v5e:4x4 --distributed=on \
#     --workdir=/mnt/bucket/motion --config.data.path=/mnt/bucket/faces
# Paths are mounted ones (a disk, or a bucket through its driver), not gs://. The config ends with the grid of the slice
# (16 chips here), which spreads its batch over it; `dexportrait plan` says beforehand whether it fits.
# A slice that was preempted or killed (xpk restarts at 42 and from 127 on by itself), or ended with code 75 (stopped and
# saved) or 70 (a fault, such as a process meets when another one was killed), is started again up to RESTARTS times. A
# host that is taken away has five minutes to save; `exec` lets SIGTERM through to it. On Spot nodes GKE gives 15
# seconds, or up to 120 where the node pool says so: there a run goes on from its last checkpoint, so give
# --config.checkpoint.minutes=5 or less.
set -euo pipefail
name="$1"
shift
if [ "$1" = train ]; then  # so long a save may take, within the five minutes; what is given goes before it
  shift
  set -- train --config.checkpoint.timeout_seconds=240 "$@"
fi
exec xpk workload create \
  --cluster="${CLUSTER:?name of the GKE cluster}" \
  --workload="$name" \
  --tpu-type="${TPU:?such as v5litepod-16}" \
  --num-slices="${SLICES:-1}" \
  --docker-image="${IMAGE:?image with the package in it}" \
  --max-restarts="${RESTARTS:-100}" \
  --restart-on-exit-codes=70,75 \
  --termination-grace-period-seconds=300 \
  --command="exec dexportrait $(printf '%q ' "$@")"
