#!/usr/bin/env bash
# Models of mindnlp 0.5.1 with windowed attention against PyTorch's, in environments of their own.
#     bash tests/zoo/run.sh FOLDER [family ...]      a folder for the environments, tiny models and their answers
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
if [ ! -d "$folder/torch" ]; then
    python3 -m venv "$folder/torch"
    "$folder/torch/bin/pip" install -q torch==2.13.0 transformers==4.57.1 "numpy<2"
fi
if [ ! -d "$folder/mindnlp" ]; then
    python3 -m venv "$folder/mindnlp"
    "$folder/mindnlp/bin/pip" install -q mindspore==2.7.2 "numpy<2" transformers==4.57.1 datasets==4.0.0 "pyarrow<21" \
        safetensors sentencepiece scipy ml_dtypes addict ftfy evaluate pyctcdecode pytest importlib_metadata
    # these want PyTorch, which mindnlp brings a module of that name for, and mindnlp an earlier MindSpore
    "$folder/mindnlp/bin/pip" install -q --no-deps mindnlp==0.5.1 diffusers==0.35.1 accelerate==1.10.1 peft==0.17.1
    "$folder/mindnlp/bin/pip" install -q --no-deps "$here/../.."
fi
"$folder/torch/bin/python" "$here/make_reference.py" "$folder/answers" "$@"
PYTHONPATH="$here" GLOG_v=3 "$folder/mindnlp/bin/python" "$here/check.py" "$folder/answers" "$@"
