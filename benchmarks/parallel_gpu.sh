#!/usr/bin/env bash
# Several processes on one card, in under four minutes: benchmarks/parallel_gpu.sh [FOLDER] [OPTION ...]
#
# One rank of NCCL, then two ranks of gloo on the same card: the latency and the bandwidth of collectives, a model over these
# ranks beside the same model alone, and a sequence that they share. Each part writes its own file into FOLDER (default:
# benchmarks/results/parallel), and a part whose file is there is not run again. The page comes last, and names the card.
# `benchmarks/parallel_gpu.sh FOLDER --device cpu --quick` tries the script itself on any machine, with gloo for both.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-benchmarks/results/parallel}
shift || true
mkdir -p "$folder"
failed=0

ranks() { # ranks SECONDS NUMBER BACKEND OPTION...: at most so long; the file stays only if all ranks succeeded
    local limit=$1 number=$2 backend=$3 file="$folder/$3-$2.json"
    shift 3
    if [[ -s $file ]]; then
        printf '== %s: there already\n' "$file"
        return
    fi
    printf '== %s\n' "$file"
    timeout --kill-after=5 "$limit" python -m torch.distributed.run --standalone --nproc-per-node "$number" \
        -m benchmarks.parallel_gpu "$backend" --folder "$folder" "$@" || {
        printf '== %s: failed, or took more than %d s\n' "$file" "$limit"
        failed=1
    }
}

first=nccl
[[ $* =~ --device[=\ ]cpu ]] && first=gloo

ranks 120 1 "$first" "$@"
ranks 110 2 gloo "$@"
python -m benchmarks.parallel_gpu page --folder "$folder" || failed=1
exit "$failed"
