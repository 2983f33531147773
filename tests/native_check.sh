#!/usr/bin/env bash
# Builds and runs the kernel's check: bash tests/native_check.sh [plain | sanitize | x86-64 | aarch64] [cases]
#   plain     compiled as it is shipped, for each width of vectors that this machine has
#   sanitize  with the address, undefined-behaviour and leak sanitizers
#   x86-64    on an emulated processor that has nothing above SSE4: the baseline (Debian: qemu-user)
#   aarch64   cross-compiled and emulated (Debian: g++-aarch64-linux-gnu, qemu-user)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
cases=${2:-400}
flags=(-std=c++17 -ffp-contract=fast -pthread -Wall -Wextra -Wshadow native_check.cpp)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
case "${1:-plain}" in
plain)
  "${CXX:-g++}" -O3 "${flags[@]}" -o "$scratch/check"
  "$scratch/check" "$cases" ;;
sanitize)
  "${CXX:-g++}" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all "${flags[@]}" -o "$scratch/check"
  "$scratch/check" "$cases" ;;
x86-64)
  "${CXX:-g++}" -O3 "${flags[@]}" -static -o "$scratch/check"
  qemu-x86_64 -cpu Nehalem "$scratch/check" "$cases" ;;
aarch64)
  aarch64-linux-gnu-g++ -O3 "${flags[@]}" -static -o "$scratch/check"
  qemu-aarch64 "$scratch/check" "$cases" ;;
*)
  echo "unknown: $1" >&2
  exit 2 ;;
esac
