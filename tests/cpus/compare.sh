#!/usr/bin/env bash
# Run the cell on this machine's CPU and on emulated ones, and compare what it prints, line by line.
#
#   tests/cpus/compare.sh PYTHON [FAMILY ...]      CPUS names other models (qemu-x86_64 -cpu help)
#
# Emulation is about fifty times slower and has AVX2, no AVX-512. Needs Debian's qemu-user.
set -u
cd "$(dirname "$0")/../.."
python=$1; shift
real=$(readlink -f "$python")
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
command -v qemu-x86_64 > /dev/null || { echo "error: qemu-x86_64 is missing: apt-get install qemu-user" >&2; exit 2; }
want=$("$real" -m tests.cpus.cell "$@" 2>/dev/null) || { echo "error: the cell fails on this CPU" >&2; exit 1; }
printf 'native\n%s\n' "$want"
different=0
for cpu in ${CPUS:-Haswell Skylake-Client-v3 EPYC-Rome}; do
  got=$(qemu-x86_64 -cpu "$cpu" "$real" -m tests.cpus.cell "$@" 2>/dev/null)
  if [ "$got" = "$want" ]; then
    echo "$cpu: $(wc -l <<< "$want") of $(wc -l <<< "$want") digests equal"
  else
    echo "$cpu: differs (< native, > $cpu)"
    diff <(echo "$want") <(echo "$got")
    different=1
  fi
done
exit $different
