#!/usr/bin/env bash
# Trains on this machine: one process for all its devices, or several (one for each GPU, or to try what a cluster does).
#   bash launch/local.sh WORKDIR --config=configs/wise_mae.py:variant=B --config.data.dir=TILES
#   PROCESSES=2 bash launch/local.sh WORKDIR --config=...      # two processes that train one run
#   bash launch/local.sh --dry-run WORKDIR --config=...        # prints what would run
# Run it again to go on where it stopped. A run that was preempted (exit code 85) is started again here, up to RESTARTS times.
# Settings: PROCESSES (1), PORT (29500), RESTARTS (3), WAVEPATH (the command; .venv's, or the one on the PATH).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 2 ]; then sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; fi
workdir="$1"; shift
processes="${PROCESSES:-1}"
wavepath="${WAVEPATH:-$root/.venv/bin/wavepath}"
[ -n "${WAVEPATH:-}" ] || [ -x "$wavepath" ] || wavepath=wavepath

start() {  # every process, in the background; waits for all; the first exit code that is not 0
  local pids=() index code=0 one found before alive
  for ((index = 0; index < processes; index++)); do
    local command=("$wavepath" train "--workdir=$workdir" "$@")
    [ "$processes" -eq 1 ] || command+=(--coordinator "localhost:${PORT:-29500}" --processes "$processes" --process "$index")
    if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; continue; fi
    # Of several each takes the GPU of its number; without that each would claim all of them.
    if [ "$processes" -gt 1 ]; then export JAX_LOCAL_DEVICE_IDS="$index"; fi
    "${command[@]}" &
    pids+=("$!")
  done
  # A signal to this script is one to the run, which saves, and ends both.
  trap 'stopped=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
  for one in ${pids[@]+"${pids[@]}"}; do
    found=0
    wait "$one" || found=$?
    # A signal to this script ends `wait` first, and the run is still saving then. Asked again, it gives the code of a process that has ended too.
    while [ "$found" -gt 128 ]; do
      before="$found" alive="" found=0
      if kill -0 "$one" 2>/dev/null; then alive=1; fi
      wait "$one" || found=$?
      [ -n "$alive" ] || [ "$found" -ne "$before" ] || break
    done
    [ "$code" -ne 0 ] || code="$found"
  done
  trap - TERM INT
  return "$code"
}

stopped=""
for ((attempt = 0; ; attempt++)); do
  code=0
  start "$@" || code=$?
  [ "$code" -eq 85 ] && [ -z "$stopped" ] && [ "$attempt" -lt "${RESTARTS:-3}" ] || exit "$code"
  echo "preempted after saving; going on (restart $((attempt + 1)) of ${RESTARTS:-3})" >&2
done
