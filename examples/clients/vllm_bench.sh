#!/bin/sh
# vLLM's own benchmark: --extra-body is a part of every request. TOKENIZER is the model's folder or hub id.
# The command `vllm` of vLLM's CPU package does not start: there this is what it runs.
set -eu
bench() {
    if python -c 'from importlib.metadata import version; version("vllm")' 2> /dev/null; then
        vllm bench serve "$@"
    else
        python -c '
from argparse import ArgumentParser
from vllm.benchmarks import serve
serve.add_cli_args(parser := ArgumentParser())
serve.main(parser.parse_args())' "$@"
    fi
}
bench --backend openai --base-url "${QSHARP_URL:-http://localhost:8000}" --model "$MODEL" --tokenizer "$TOKENIZER" \
    --dataset-name random --random-input-len 16 --random-output-len 16 --num-prompts 16 --max-concurrency 4 \
    --extra-body '{"eta": 0.1, "guidance": {"candidates": 8}}'
