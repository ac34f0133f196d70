#!/bin/sh
# Build llama-cpp-python (about 3 minutes on two cores) from its source package, which carries llama.cpp's converter.
# Usage: tests/surgery/llama_cpp.sh DIR; then run pytest with the two settings that it prints.
set -eu
directory=${1:?usage: $0 DIR}
version=0.3.36
mkdir -p "$directory"
cd "$directory"
python3 -m venv venv
venv/bin/pip install -q scikit-build-core cmake ninja numpy jinja2 diskcache typing-extensions
venv/bin/pip download -q --no-deps --no-build-isolation --no-binary :all: "llama-cpp-python==$version"
tar xzf "llama_cpp_python-$version.tar.gz"
# One portable instruction set: the native build crashes on machines whose AVX-512 support the compiler overestimates.
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF" \
    venv/bin/pip install -q --no-deps --no-build-isolation "./llama_cpp_python-$version.tar.gz"
echo "export PYPRUNE_LLAMA_CPP=$PWD/llama_cpp_python-$version/vendor/llama.cpp"
echo "export PYPRUNE_LLAMA_CPP_PYTHON=$PWD/venv/bin/python"
