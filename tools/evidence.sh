#!/usr/bin/env bash
# The experiments of results/16k, in order, on one GPU: bash tools/evidence.sh. Or some of them, each below
# 8 minutes on an H200, the seeds first; on two GPUs:
#   CUDA_VISIBLE_DEVICES=0 bash tools/evidence.sh seed-1337 control-1337 no-warmup &
#   CUDA_VISIBLE_DEVICES=1 bash tools/evidence.sh seed-1338 control-1338
# `selectors` is 22 runs, each of which can be named: bash tools/evidence.sh recent-1024 copy-recent-1024; by
# another seed, for the pairs that carry a claim: copy@1338 copy-recent-1024@1338, seed-1338 recent-1024@1338.
# EXTRA: options for train.py ahead of a run's own (EXTRA=--resume goes on after an interruption;
# --sparse_steps=50 makes the oracle affordable); COPIES: strings copied at each distance; PYTHON, RUNS,
# RESULTS: interpreter, checkpoints, what is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
RUNS=${RUNS:-out/16k}
RESULTS=${RESULTS:-results/16k}
start=$RUNS/seed-1337
above=$(dirname "$RESULTS")
config=16k  # of configs/

# `run` names the folder below RUNS and RESULTS that these work on
train() {
  $python train.py --config="configs/$config.conf" ${EXTRA:-} --out_dir="$RUNS/$run" "$@"
}

measure() {
  $python evaluate.py --checkpoint="$RUNS/$run/sparse" "$@"
}

keep() {
  $python -m tools.report "$RESULTS/$run" --collect="$RUNS/$run" "$@"
}

ablation() {
  train --stage=sparse "$@"
  measure --batches=4 --copies=8
  keep
}

# short contexts first, where copying is learnt in many small steps, then the three stages at 16K
copy() {
  local config=copy RESULTS=$above copies=$RUNS/copies
  local short="--stage=dense --data=$copies --block_size=1024 --batch_size=32 --schedule=constant"
  [ -d "$copies" ] || $python -m tools.copies "$copies"
  run=copy-plain
  train $short --dense_steps=2350 --dense_lr=2e-3 --initializer_range=0.02  # in vain
  run=copy-short
  train $short --dense_steps=1800 --dense_lr=1e-3
  run=copy
  train --data="$copies" --init_from="$RUNS/copy-short/dense"
  train --stage=control --data="$copies"
  measure --batches=4 --copies=64
  keep --plots
  local control=$RUNS/copy/evaluation-control
  $python evaluate.py --checkpoint="$RUNS/copy/control" --batches=1 --copies=64 --out_dir="$control"
  cp "$control/evaluation.json" "$RESULTS/copy/evaluation-control.json"
  for run in copy-plain copy-short; do
    keep
  done
}

# what `copy` is up to its sparse stage, by another seed: of the order of batches and of the new indexers
copy_again() {
  local config=copy
  local options="--data=$RUNS/copies --seed=$number"
  train $options --stage=dense --init_from="$RUNS/copy-short/dense"
  train $options --stage=warmup
}

# the sparse stage with k tokens chosen by another selector: NAME-K on code, copy-NAME-K on text to be copied,
# each from the warm-up of $start or of `copy`; NAME-K@SEED from that of seed-SEED or copy@SEED. The oracle
# takes minutes, the others a minute or two
selector() {
  local RESULTS=$above/selectors
  local what=${run%@*} seed=1337 copied=copy
  if [[ $run == *@* ]]; then
    seed=${run#*@}
    copied=copy@$seed
  fi
  local k=${what##*-} name=${what%-*}
  local options="--stage=sparse --selector=${name#copy-} --index_topk=$k --seed=$seed"
  if [[ $run == copy-* ]]; then
    local config=copy
    train $options --data="$RUNS/copies" --init_from="$RUNS/$copied/warmup"
    measure --batches=4 --copies="${COPIES:-64}"
  else
    train $options --init_from="$RUNS/seed-$seed/warmup"
    measure --batches=4 --copies=8
  fi
  keep
}

# the copying model goes on at 128K, positions by YaRN: needles as far back as that; with exact selection, in
# two levels by blocks of 16 tokens or as many as named, and densely
far() {
  local config=copy RESULTS=$above/far copies=$RUNS/copies-far name stage levels
  local options="--data=$copies --yarn_factor=8 --block_size=131072 --batch_size=1 --recompute
    --sparse_steps=50 --ramp_steps=5 --eval_interval=50 --eval_steps=8"
  [ -d "$copies" ] || $python -m tools.copies "$copies" --documents=150 --length=262144
  for name in ${1:-exact blocks-16 control}; do
    run=far-$name
    stage=sparse
    levels=""
    case $name in
      blocks-*)
        levels="--index_block=${name##*-} --index_candidates=8192" ;;
      control)
        stage=control ;;
    esac
    train $options --stage=$stage --init_from="$RUNS/copy/$stage" $levels
    $python evaluate.py --checkpoint="$RUNS/$run/$stage" --batches=2 --copies=8 \
      --out_dir="$RUNS/$run/evaluation-sparse"
    keep
  done
}

# a corpus of which nothing is read twice: the packages installed beside this Python, at two contexts
packages() {
  local RESULTS=$above/packages
  local options="--data=packages"
  if [ "$number" = 64k ]; then
    options="$options --block_size=65536 --batch_size=1 --dense_steps=300 --warmup_steps=60 --sparse_steps=60
      --ramp_steps=15 --eval_steps=8"
  fi
  train $options
  train $options --stage=control
  measure --batches=4 --copies=8
  keep
}

# one model read with fewer and more tokens than it was trained with, chosen by each selector
sweep() {
  local RESULTS=$above/selectors
  $python evaluate.py --checkpoint="$start/sparse" --sweep=all --batches=2 --copies=8 --out_dir="$RUNS/sweep"
  mkdir -p "$RESULTS/sweep"
  cp "$RUNS/sweep/evaluation.json" "$RUNS/sweep/sweep.png" "$RESULTS/sweep"
}

# the same run by the reference and by the kernels, and the same text
backends() {
  local config=small RESULTS=$above/backends backend
  for backend in torch triton; do
    run=$backend
    train --backend=$backend
  done
  for backend in torch triton; do
    $python sample.py --checkpoint="$RUNS/triton/sparse" --dtype=float32 --temperature=0 --num_tokens=200 \
      --prompt="def main(" --backend=$backend > "$RUNS/$backend.txt"
  done
  cmp "$RUNS/torch.txt" "$RUNS/triton.txt"
  for run in torch triton; do
    keep
  done
  $python -m tools.report "$RESULTS/triton" --compare="$RESULTS/torch"
}

# at 1/16 and 1/64 of the context; the indexer's runs are for k = 1024 seed-1337 and copy
selectors="indexer-256 recent-1024 recent-256 sinks-1024 sinks-256 random-1024 random-256
  strided-1024 strided-256 oracle-1024 oracle-256
  copy-indexer-256 copy-recent-1024 copy-recent-256 copy-sinks-1024 copy-sinks-256 copy-random-1024
  copy-random-256 copy-strided-1024 copy-strided-256 copy-oracle-1024 copy-oracle-256"
everything="seed-1337 control-1337 evaluate-1337 seed-1338 control-1338 evaluate-1338
  no-warmup topk-512 topk-2048 no-detach no-fp8 heads-4 heads-16 copy long backends selectors sweep
  far packages-16k packages-64k table"
for name in ${@:-$everything}; do
  echo "=== $name"
  run=$name
  number=${name##*-}
  case $name in
    seed-*)
      train --seed=$number ;;
    control-*)
      run=seed-$number
      train --stage=control --seed=$number ;;
    evaluate-*)
      run=seed-$number
      measure
      keep --plots ;;
    no-warmup)
      ablation --init_from=$start/dense ;;
    topk-*)
      ablation --init_from=$start/warmup --index_topk=$number ;;
    no-detach)
      ablation --init_from=$start/warmup --detach=false ;;
    no-fp8)
      ablation --init_from=$start/warmup --index_fp8=false ;;
    heads-*)
      train --stage=warmup --init_from=$start/dense --index_n_heads=$number
      ablation --index_n_heads=$number ;;
    copy)
      copy ;;
    copy@*)
      number=${name#*@}
      copy_again ;;
    far)
      far ;;
    far-exact|far-blocks-*|far-control)
      far "${name#far-}" ;;
    packages-*)
      packages ;;
    selectors)
      for run in $selectors; do
        selector
      done ;;
    indexer-*|recent-*|sinks-*|random-*|strided-*|oracle-*|copy-*-*)
      selector ;;
    sweep)
      sweep ;;
    long)
      $python bench.py --only=long --checkpoint=$start/sparse --out_dir="$RESULTS/long" ;;
    backends)
      backends ;;
    table)
      $python -m tools.report "$RESULTS" ;;
    *)
      echo "evidence.sh: $name: no such run; choose from" $everything $selectors >&2
      exit 2 ;;
  esac
done
