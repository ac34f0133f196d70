#!/bin/sh
# Build llama-cpp-python (about 3 minutes on two idle cores) from its source package, which carries llama.cpp's converter.
# Usage: tests/surgery/llama_cpp.sh DIR; then run pytest with the two settings that it prints.
set -eu
directory=${1:?usage: $0 DIR}
version=0.3.36
mkdir -p "$directory"
cd "$directory"
python3 -m venv venv
venv/bin/pip install -q numpy jinja2 diskcache typing-extensions
venv/bin/pip download -q --no-deps --no-binary llama-cpp-python "llama-cpp-python==$version"
tar xzf "llama_cpp_python-$version.tar.gz"
# One portable instruction set: a native build was seen to crash on a machine with AVX-512 and AMX.
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF" \
    venv/bin/pip install -q --no-deps "./llama_cpp_python-$version.tar.gz"
echo "export PYPRUNE_LLAMA_CPP=$PWD/llama_cpp_python-$version/vendor/llama.cpp"
echo "export PYPRUNE_LLAMA_CPP_PYTHON=$PWD/venv/bin/python"
