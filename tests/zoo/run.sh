#!/usr/bin/env bash
# Compares models of mindnlp 0.5.1 and mindone 0.5.0 that use this package's attention with PyTorch's. It makes an
# environment for each.
#     bash tests/zoo/run.sh FOLDER [family ...]      FOLDER gets the environments, the tiny models and their results
# FOLDER also gets what test_zoo_layers.py compares, zoo_VERSION.npz, recorded from transformers 4.57.1 and 5.24.0.
# It exits with 0 if each family is within the bounds of check.py, or fails as known.py says.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift

# environment NAME PACKAGE ...: makes it if it is not there
environment() {
    if [ ! -d "$folder/$1" ]; then
        python3 -m venv "$folder/$1"
        "$folder/$1/bin/pip" install -q "${@:2}"
    fi
}

# installs packages without their dependencies: PyTorch, which mindnlp replaces, and another MindSpore
alone() {
    "$folder/$1/bin/pip" install -q --no-deps "${@:2}" "$here/../.."
}

environment torch torch==2.13.0 transformers==4.57.1 "numpy<2"
environment torch5 torch==2.13.0 transformers==5.24.0 "numpy<2"
environment mindnlp mindspore==2.7.0 "numpy<2" transformers==4.57.1 datasets==4.0.0 "pyarrow<21" safetensors sentencepiece \
    scipy ml_dtypes addict ftfy evaluate pyctcdecode pytest importlib_metadata
alone mindnlp mindnlp==0.5.1 diffusers==0.35.1 accelerate==1.10.1 peft==0.17.1
environment mindone mindspore==2.10.0 "numpy<2" transformers==4.57.1 omegaconf "opencv-python-headless<4.12" safetensors \
    ftfy pyyaml tqdm huggingface_hub
alone mindone mindone==0.5.0 mindcv==0.3.0

"$folder/torch/bin/python" "$here/make_reference.py" "$folder/answers" "$@"
for name in torch torch5; do
    "$folder/$name/bin/python" "$here/record_layers.py" "$folder"
done
status=0
for zoo in mindnlp mindone; do
    GLOG_v=4 "$folder/$zoo/bin/python" "$here/check.py" "$zoo" "$folder/answers" "$@" || status=1
done
exit $status
