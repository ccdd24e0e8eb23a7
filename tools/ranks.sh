#!/usr/bin/env bash
# What docs/PARALLEL.md reports of several GPUs, without a network: bash tools/ranks.sh 1 2 4. Some nine
# minutes on four H100s; each line is printed as it is measured. PYTHON: interpreter; OUT: for the runs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
OUT=${OUT:-out/ranks}
counts=${*:-1 2 4}

on() {  # on N SCRIPT OPTIONS...: a script on N ranks
  local n=$1
  shift
  if [ "$n" = 1 ]; then
    timeout 150 $python "$@"
  else
    timeout 150 $python -m torch.distributed.run --standalone --nproc-per-node="$n" "$@"
  fi
}

# the table
for n in $counts; do
  on "$n" tools/ranks.py data sparse-128k dense-128k
done
for n in $counts; do
  [ "$n" = 1 ] || on "$n" tools/ranks.py twin-128k
  on "$n" tools/ranks.py million
done

# the same run on one and on all: its losses in one picture, $OUT/N/plot.png
first=
for n in $counts; do
  on "$n" train.py --overwrite --out_dir="$OUT/$n" --gradient_accumulation_steps=4 --batch_size=2 \
    --dense_steps=40 --warmup_steps=20 --sparse_steps=20 --ramp_steps=5 --eval_interval=20 \
    ${first:+--compare=$first} | grep -E "step|processes"
  first=${first:-$OUT/$n}
done
