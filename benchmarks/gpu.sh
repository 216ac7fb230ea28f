#!/usr/bin/env bash
# The device tests of the suite and the GPU grid, in under six minutes: benchmarks/gpu.sh [FOLDER] [OPTION ...]
#
# Each part writes its own file into FOLDER (default: benchmarks/results/gpu), and a part whose file is there is not run
# again, so a run that was cut off is resumed by the same command. The page comes last, and names the card.
# `benchmarks/gpu.sh FOLDER --device cpu --quick` tries the script itself on any machine.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-benchmarks/results/gpu}
shift || true
mkdir -p "$folder"
failed=0

part() { # part SECONDS FILE COMMAND...: at most so long; FILE stays only if the command succeeded
    local limit=$1 file=$2
    shift 2
    if [[ -s $file ]]; then
        printf '== %s: there already\n' "$file"
        return
    fi
    printf '== %s\n' "$file"
    timeout --kill-after=5 "$limit" "$@" || {
        printf '== %s: failed, or took more than %d s\n' "$file" "$limit"
        failed=1
    }
}

# On a card only its own cases: those of the CPU compile kernels for a minute there.
device=cuda
[[ $* =~ --device[=\ ]cpu ]] && device=cpu

tests() {
    python -m pytest -q --no-header -p no:cacheprovider -m device -k "$device" tests/integration/test_devices.py |&
        tee "$folder/tests.tmp"
    local result=${PIPESTATUS[0]}
    ((result == 0)) && mv "$folder/tests.tmp" "$folder/tests.log"
    return "$result"
}
export -f tests
export folder device

part 65 "$folder/tests.log" bash -c tests
part 65 "$folder/decode.json" python -m benchmarks.gpu decode --folder "$folder" --seconds 50 "$@"
part 50 "$folder/prefill.json" python -m benchmarks.gpu prefill --folder "$folder" --seconds 30 "$@"
part 140 "$folder/steps.json" python -m benchmarks.gpu steps --folder "$folder" "$@"
python -m benchmarks.gpu page --folder "$folder" "$@" || failed=1
exit "$failed"
