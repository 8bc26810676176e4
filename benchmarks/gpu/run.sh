#!/usr/bin/env bash
# On the rented machine, in the repository's root: bash .gpu/run.sh [options of benchmarks.gpu]
# Facts, log and warnings are written under $OUT (the working directory where it is not set).
set -uo pipefail
out=${OUT:-.}
mkdir -p "$out"
site=${SITE:-/tmp/lora-audit-site}
if [ ! -e "$site/complete" ]; then
    mkdir -p "$site" && tar -C "$site" -xJf .gpu/site.tar.xz --no-same-owner && touch "$site/complete" || exit 1
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"${PYTHON:-python3}" -m benchmarks.gpu --json "$out/gpu.json" "$@" 2>"$out/gpu.stderr.txt" | tee "$out/gpu.log"
code=$?
grep -vi 'warn' "$out/gpu.stderr.txt" | tail -n 15
exit "$code"
