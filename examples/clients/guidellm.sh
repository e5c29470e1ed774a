#!/bin/sh
# guidellm: the model's name says it. TOKENIZER is the model's folder or hub id.
set -eu
guidellm run --backend "kind=openai_http,target=${QSHARP_URL:-http://localhost:8000},model=$MODEL@eta=0.1" \
    --tokenizer "kind=huggingface_auto,model=$TOKENIZER" --data kind=synthetic_text,prompt_tokens=16,output_tokens=16 \
    --profile kind=concurrent,streams=4 --constraint kind=max_requests,count=16
