#!/usr/bin/env bash
# Trains on a TPU VM, of one host or of a pod: copies the project to every worker, installs it there, and starts the same command on all.
#   TPU=NAME ZONE=us-central2-b bash launch/tpu_pod.sh /mnt/RUN --config=configs/wise_mae.py:variant=L --config.data.dir=/mnt/TILES
#   TPU=NAME ZONE=... bash launch/tpu_pod.sh --dry-run WORKDIR --config=...      # prints what would run
# The workers find each other by themselves. WORKDIR and the data lie where every worker sees them (a mounted bucket or a network disk).
# Run it again to go on where it stopped; a run that was preempted after saving (exit code 85) is started again, up to RESTARTS times.
# Settings: TPU, ZONE, PROJECT (gcloud's own), RESTARTS (3), EXTRA ([tpu]).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; fi
workdir="$1"; shift
where=(--zone="$ZONE" --worker=all)
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")

run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
on_all() { run gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$1"; }

archive=HEAD.tar.gz
if [ -z "$dry" ]; then
  archive="$(mktemp --suffix=.tar.gz)"
  trap 'rm -f "$archive"' EXIT
  git -C "$root" archive --format=tar.gz -o "$archive" HEAD
fi
run gcloud compute tpus tpu-vm scp "$archive" "$TPU:wavepath.tar.gz" "${where[@]}"
on_all "mkdir -p wavepath && tar -xzf wavepath.tar.gz -C wavepath && cd wavepath && source launch/environment.sh && setup_environment '${EXTRA:-[tpu]}'"
words="$(printf '%q ' .venv/bin/wavepath train "--workdir=$workdir" "$@" --distributed)"
for ((attempt = 0; ; attempt++)); do
  code=0
  on_all "cd wavepath && $words" || code=$?
  [ "$code" -eq 85 ] && [ "$attempt" -lt "${RESTARTS:-3}" ] || exit "$code"
  echo "preempted after saving; going on (restart $((attempt + 1)) of ${RESTARTS:-3})" >&2
done
