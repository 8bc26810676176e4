#!/usr/bin/env bash
# Makes .gpu/, what a rented machine lacks: its image has Python 3.12, torch with CUDA, transformers, peft, accelerate,
# pyarrow and typer, and no network. Packed are the wheels of the others that `import audit` needs, stripped, as one
# site.tar.xz; run.sh there unpacks it and runs the benchmark. Called by `make gpu-kit`; needs a Python 3.12 here:
# PYTHON312=/path/to/python3.12, else the first of python3.12 and pyenv's.
set -euo pipefail
cd "$(dirname "$0")/../.."

find_python() {
    local candidate
    for candidate in "${PYTHON312:-}" python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.12 here: name one with PYTHON312=/path/to/python3.12" >&2
    return 1
}

pinned() { # NAME==VERSION as constraints.txt has it
    grep -i "^$1==" constraints.txt || { echo "$1 is not in constraints.txt" >&2; return 1; }
}

python=$(find_python)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --upgrade pip

platforms=()
for glibc in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
# the hub's client that both diffusers and the image's transformers take: this project's own is newer
requirements=(huggingface_hub==1.33.0)
for name in diffusers duckdb pydantic pydantic_core typing-inspection annotated-types; do
    requirements+=("$(pinned "$name")")
done
"${pip[@]}" download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$work/wheels" "${requirements[@]}"
"${pip[@]}" wheel --quiet --no-deps --wheel-dir "$work/wheels" "$(pinned pdqhash)" # it has no wheel
"${pip[@]}" install --quiet --no-index --no-deps --no-compile --target "$work/site" "$work"/wheels/*.whl
find "$work/site" -name '*.so' -exec strip --strip-unneeded {} + 2>/dev/null || true

# `import audit` asks for the version of its own distribution
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)
mkdir -p "$work/site/lora_audit-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: lora-audit\nVersion: %s\n' "$version" \
    >"$work/site/lora_audit-$version.dist-info/METADATA"

mkdir -p .gpu
tar -C "$work/site" --owner=0 --group=0 -c . | xz -T0 -6 >.gpu/site.tar.xz
cp benchmarks/gpu/run.sh .gpu/run.sh
ls -l .gpu
