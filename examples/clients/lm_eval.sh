#!/bin/sh
# lm-evaluation-harness: --gen_kwargs go into requests that sample. Log-likelihoods are the model's own in any case.
# lm_eval/ has a task of each kind; TOKENIZER is the model's folder or hub id.
set -eu
lm_eval run --model local-completions \
    --model_args "model=$MODEL,base_url=${QSHARP_URL:-http://localhost:8000}/v1/completions,tokenizer=$TOKENIZER,num_concurrent=8" \
    --include_path "$(dirname "$0")/lm_eval" --tasks sums,sums_choice \
    --gen_kwargs eta=0.1,temperature=1,max_gen_toks=40
