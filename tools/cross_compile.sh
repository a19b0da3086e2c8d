#!/usr/bin/env bash
# Compile the kernels for systems that this one is not, to see that they can be.
#
#   tools/cross_compile.sh python -m ziglang cc
set -euo pipefail
native="$(dirname "$0")/../src/smolstack/native"
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
for target in x86_64-windows-gnu x86_64-macos aarch64-macos aarch64-linux-musl; do
  flags="-target $target -O2 -std=gnu11 -ffp-contract=off -I$native"
  case "$target" in
    x86_64-*) flags="$flags -march=haswell" ;;
    *) flags="$flags -mcpu=generic+v8_2a+fullfp16+dotprod+i8mm+bf16" ;;
  esac
  for file in "$native"/*.c; do
    # shellcheck disable=SC2086
    [ "$(basename "$file")" = cpu_features.c ] || "$@" $flags -c "$file" -o "$out/kernels.o"
  done
  echo "$target: compiled"
done
