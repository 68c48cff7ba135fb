#!/usr/bin/env bash
# Check the GPU path within 8 minutes: the GPU tests, the default ablation, and the speed of features.
#
#     benchmarks/gpu_check.sh [FOLDER]
#
# Needs an environment with requirements-dev.txt. Logs, runs and caches go to FOLDER, or to a new
# temporary folder. Exit code: 0 if every part passed, 1 if one failed, 2 if there is no GPU.
set -uo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)" || exit 1
cd "$root" || exit 1

device="$(python -c '
import torch
if torch.cuda.is_available():
    memory = torch.cuda.get_device_properties(0).total_memory >> 30
    print(f"{torch.cuda.get_device_name(0)}, {memory} GiB, torch {torch.__version__}")
')" || exit 1
if [ -z "$device" ]; then
  echo "no GPU: torch sees none, so nothing was checked" >&2
  exit 2
fi

mkdir -p "${1:-.}" || exit 1
if [ $# -gt 0 ]; then out="$(cd "$1" && pwd)"; else out="$(mktemp -d)"; fi
echo "device: $device; logs: $out"

# Nothing that another run left may be reused, and nothing is written into the repository.
unset MLFLOW_TRACKING_URI MLFLOW_RUN_ID MLFLOW_EXPERIMENT_ID MLFLOW_EXPERIMENT_NAME
export TRAK_ABLATION_CACHE="$out/cache" PYTHONPATH="$root"
summary=()
failed=0

# part NAME SECONDS COMMAND...: run the command in FOLDER, show its output and keep it in NAME.log.
part() {
  local name="$1" limit="$2" start="$SECONDS" code result fallbacks
  shift 2
  echo "== $name: $*"
  (cd "$out" && timeout --kill-after=5 "$limit" "$@") 2>&1 | tee "$out/$name.log"
  code="${PIPESTATUS[0]}"
  case "$code" in
    0) result="passed" ;;
    124 | 137) result="FAILED: not done within $limit s" ;;
    *) result="FAILED: exit code $code" ;;
  esac
  [ "$code" -eq 0 ] || failed=1
  fallbacks="$(grep -c "plain path" "$out/$name.log")"
  [ "$fallbacks" -eq 0 ] || result="$result, with $fallbacks lines about the plain path"
  summary+=("$name: $result ($((SECONDS - start)) s)")
}

# 440 s in all, and 5 s more for each part that has to be killed.
part tests 170 python -m pytest "$root/tests/test_gpu.py" --rootdir "$root" -p no:cacheprovider --durations=5
part ablation 140 python -m scripts.ablation --frac 0.05 --device cuda
part features 130 python -m benchmarks features --device cuda --repeats 3 --json "$out/features.json" \
  --settings resnet18-224 resnet18-64 mini-32 mini-16

echo "== summary: $device"
printf '%s\n' "${summary[@]}"
exit "$failed"
