#!/usr/bin/env bash
# Runs this package's attention in mindformers 1.9.0: tiny models on CPU against mindformers' own attention, the halo in
# two processes on CPU, and training steps of every way to be parallel in MindSpore's dry run on Ascend, with stubs of
# its libraries (tests/devices). Needs Linux on x86-64, Python 3.11, gcc, g++, readelf and nm; takes about an hour.
#     bash tests/zoo/mindformers.sh FOLDER [values|ranks|cost|dry]      FOLDER gets the environment and the graphs
# It exits with 0 if everything is within its bounds.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
parts=${2:-values ranks cost dry}
if [ ! -d "$folder/venv" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q mindspore==2.9.0 mindformers==1.9.0 "numpy<2"
    "$folder/venv/bin/pip" install -q --no-deps "$here/../.."
fi
export PATH="$folder/venv/bin:$PATH" GLOG_v=3 MS_OM_PATH="$folder" PYTHONPATH="$here/.." PYTHONDONTWRITEBYTECODE=1
cd "$folder"
status=0
for part in $parts; do
    case $part in
        values) python "$here/mindformers/values.py" 2> values.log || status=1 ;;
        cost) python "$here/mindformers/cost.py" 2> cost.log || status=1 ;;
        dry) python "$here/mindformers/dry.py" "$folder/dry" || status=1 ;;
        ranks)
            msrun --worker_num=2 --local_worker_num=2 --join=True --log_dir="$folder/logs" \
                "$here/mindformers/ranks.py" > ranks.log 2>&1 || status=1
            grep -h " rank . of " logs/worker_*.log || status=1 ;;
    esac
done
exit $status
