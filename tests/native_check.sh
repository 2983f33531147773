#!/usr/bin/env bash
# The kernel's own check, by itself: bash tests/native_check.sh [plain | sanitize | x86-64 | aarch64] [cases]
#   plain     as it is shipped, at each level that this machine has
#   sanitize  with the address, undefined-behaviour and leak sanitizers
#   x86-64    at the baseline, on an emulated processor that has nothing above SSE4 (Debian: qemu-user)
#   aarch64   cross-built and emulated (Debian: g++-aarch64-linux-gnu, qemu-user)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
cases=${2:-400}
flags=(-std=c++17 -ffp-contract=fast -pthread -Wall -Wextra native_check.cpp)
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
