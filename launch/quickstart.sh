#!/usr/bin/env bash
# The main job on a fresh machine: environment, slides, screening, tiles, pretraining, features, probe, report.
#   bash launch/quickstart.sh                 phantom slides are made for it
#   bash launch/quickstart.sh SLIDES_DIR      your own slides (with SLIDES_DIR/labels.csv, if it is there, a probe as well)
# Everything goes to ./quickstart (or $WAVEPATH_OUT); running it again goes on where it stopped.
# Settings: WAVEPATH_OUT, WAVEPATH_STEPS (default 200), WAVEPATH_MPP_CSV (a table `slide,mpp` for slides that carry none).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
setup_environment ""

slides="${1:-}"
out="${WAVEPATH_OUT:-$root/quickstart}"
steps="${WAVEPATH_STEPS:-200}"
mkdir -p "$out"
labels=""
if [ -z "$slides" ]; then
  slides="$out/slides"
  # labels.csv is written last. Slides made again would look newer than their tiles, which would be made again too.
  [ -f "$slides/labels.csv" ] || "$WAVEPATH" phantom --out "$slides" --slides 4 --size 6144 --seed 0
  labels="$slides/regions"
elif [ -f "$slides/labels.csv" ]; then
  labels="$slides/labels.csv"
fi

# Exit code 3 means done, with some slides reported as failed: they are in manifest.csv, the rest goes on.
allow_partial() { "$@" || { code=$?; [ "$code" -eq 3 ] || exit "$code"; }; }

prepare=(--slides "$slides" --out "$out/tiles")
[ -n "${WAVEPATH_MPP_CSV:-}" ] && prepare+=(--mpp-csv "$WAVEPATH_MPP_CSV")
allow_partial "$WAVEPATH" prepare "${prepare[@]}"
"$WAVEPATH" train --config="configs/wise_mae.py:quickstart" --workdir "$out/run" --config.data.dir="$out/tiles" --config.train.steps="$steps"
allow_partial "$WAVEPATH" embed --checkpoint "$out/run" --data "$out/tiles" --out "$out/features"
probe=0
if [ -n "$labels" ]; then
  # The encoder has seen all of these slides, so the table says how it describes them, not how it would do on new ones (and says so itself). Labels of
  # one class or one case cannot be probed; the report is still worth having.
  "$WAVEPATH" evaluate --features "$out/features" --labels "$labels" --keep-pretraining-slides --skip-missing --min-cases 2 \
    --out "$out/run/evaluation" || probe=3
else
  echo "no labels.csv in $slides: the probe is left out (columns case_id,slide_id,label)" >&2
fi
"$WAVEPATH" report "$out/run" --out "$out/report.html"
echo "report: $out/report.html"
exit "$probe"
