#!/usr/bin/env bash
# Post-training on all GPUs of a host: the specialists side by side, then the control beside the mixed stages:
#   bash tools/post_gpus.sh out/post-large --config=configs/post_large.conf
# What runs side by side has folders of its own next to the given one; its models are moved from there. The
# same command goes on after an interruption. DOMAINS: only these ("math writing"); PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=$1
shift
domains=${DOMAINS:-math logic code agent search writing question}
options=("$@" --domains="${domains// /,}")
gpus=$({ nvidia-smi -L 2> /dev/null || true; } | wc -l)
turn=0
declare -A running
trap 'jobs -p | xargs -r kill; wait' EXIT  # none goes on alone

# post_train FOLDER OPTIONS...: there, or on from what is there. exec=exec: in place of the shell
post_train() {
  local folder=$1 resume=
  shift
  [ ! -e "$folder/run.json" ] || resume=--resume
  ${exec:-} $python post_train.py "${options[@]}" $resume --out_dir="$folder" "$@"
}

# aside NAME OPTIONS...: in the background, on the next GPU, from the base and the reward model
aside() {
  local folder=$out-$1
  shift
  mkdir -p "$folder"
  cp -rn "$out/base" "$folder"
  [ ! -d "$out/judge" ] || cp -rn "$out/judge" "$folder"
  local gpu=$((turn % (gpus > 0 ? gpus : 1)))
  CUDA_VISIBLE_DEVICES=$gpu exec=exec post_train "$folder" "$@" > "$folder/log.txt" 2>&1 &
  running[$folder]=$!
  turn=$((turn + 1))
}

# take NAME MODEL: when NAME is done, its model and its metrics
take() {
  local folder=$out-$1
  if ! wait "${running[$folder]}"; then
    tail -n 3 "$folder/log.txt" >&2
    exit 1
  fi
  mv "$folder/$2" "$out"
  cat "$folder/metrics.jsonl" >> "$out/metrics.jsonl"
}

post_train "$out" --stage=base
for domain in $domains; do
  [ -d "$out/specialist-$domain" ] || aside "$domain" --stage=specialists --domains="$domain"
done
for domain in $domains; do
  [ -d "$out/specialist-$domain" ] || take "$domain" "specialist-$domain"
done
[ -d "$out/sequential" ] || aside sequential --stage=sequential
for stage in distillation mixed; do
  post_train "$out" --stage=$stage
done
[ -d "$out/sequential" ] || take sequential sequential
post_train "$out" --stage=evaluate
