#!/usr/bin/env bash
# Weak supervision from end to end, on phantoms: does it help a slide-level answer to pretrain on the regions of highest wavelet energy?
#   bash launch/weak_supervision.sh
# Two sets of slides: one to pretrain on, without labels, and one with a label for each slide. Two encoders for each seed, pretrained on as many tiles
# of the same slides, from the regions of highest wavelet energy or from random ones; floors: the encoder before training, and colour statistics.
# Every encoder embeds the labelled slides, and bag networks are cross-validated by case on the features: one table, heatmaps, one report.
# Everything goes to ./weak_supervision (or $WAVEPATH_OUT); running it again goes on where it stopped.
# Settings: WAVEPATH_OUT, WAVEPATH_SEEDS (3), WAVEPATH_STEPS of each pretraining (300), WAVEPATH_SLIDES with labels (32), WAVEPATH_PRETRAIN slides (12),
# WAVEPATH_NETWORKS ("abmil mean"). About an hour on two cores; WAVEPATH_SEEDS=1 WAVEPATH_STEPS=20 WAVEPATH_SLIDES=12 WAVEPATH_PRETRAIN=4 WAVEPATH_NETWORKS=mean
# shows all stages in some minutes.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
setup_environment ""

out="${WAVEPATH_OUT:-$root/weak_supervision}"
seeds="${WAVEPATH_SEEDS:-3}"
steps="${WAVEPATH_STEPS:-300}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$root"

# Slides. labels.csv is written last: slides made again would look newer than their tiles, which would be made again too.
[ -f "$out/pretrain/labels.csv" ] || "$WAVEPATH" phantom --out "$out/pretrain" --slides "${WAVEPATH_PRETRAIN:-12}" --size 4096 --seed 11 --name pretrain
[ -f "$out/slides/labels.csv" ] || "$WAVEPATH" phantom --out "$out/slides" --slides "${WAVEPATH_SLIDES:-32}" --size 3072 --seed 0

# Tiles of 112 px at 20x, so that two cores suffice. Labelled slides give all their tissue.
tiles=(--mpp 0.5 --config.tiles.size=112 --config.screen.region_um=112 --config.screen.min_region_um=112)
for select in wavelet random; do
  "$WAVEPATH" prepare --slides "$out/pretrain" --out "$out/tiles/$select" --select "$select" --top 0.3 "${tiles[@]}"
done
"$WAVEPATH" prepare --slides "$out/slides" --out "$out/tiles/labelled" --select all "${tiles[@]}"

# Encoders and features. The arms differ in their tiles alone: as many of them (max_tiles), as many steps.
for ((seed = 0; seed < seeds; seed++)); do
  for select in wavelet random; do
    "$WAVEPATH" train --config=configs/wise_mae.py:quickstart --workdir "$out/runs/$select/$seed" --config.data.dir="$out/tiles/$select" \
      --config.data.max_tiles=400 --config.model.image_size=112 --config.train.steps="$steps" --config.seed="$seed"
    "$WAVEPATH" embed --checkpoint "$out/runs/$select/$seed" --data "$out/tiles/labelled" --out "$out/features/$select/$seed" --batch-size 128
  done
  "$WAVEPATH" embed --checkpoint "$out/runs/wavelet/$seed" --untrained --data "$out/tiles/labelled" --out "$out/features/untrained/$seed" --batch-size 128
done
"$WAVEPATH" embed --colour-statistics --data "$out/tiles/labelled" --out "$out/features/colours"

# Bag networks: five folds by case for each seed, which is that of the encoder as well.
read -r -a networks <<< "${WAVEPATH_NETWORKS:-abmil mean}"
"$WAVEPATH" evaluate --bags wavelet="$out/features/wavelet/{seed}" random="$out/features/random/{seed}" untrained="$out/features/untrained/{seed}" \
  colours="$out/features/colours" --labels "$out/slides/labels.csv" --network "${networks[@]}" --seeds "$seeds" --folds 5 \
  --tiles "$out/tiles/labelled" --out "$out/evaluation"
"$WAVEPATH" report "$out/evaluation" --out "$out/report.html"
echo "report: $out/report.html"
