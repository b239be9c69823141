#!/usr/bin/env bash
# The raw results about codecs: `make sweep` runs this. Resumable; about 40 minutes of one core.
set -euo pipefail

sweep() {  # MODEL RECIPE...
    local model=$1 words=()
    shift
    for recipe in "$@"; do words+=(--recipe "$recipe"); done
    kvferry sweep --model "testbed/$model" --check forced --n 1000 --protocols A --jpeg 90,60,40,30,20,15,10 \
        --embeds int4,int3,int2 --out "results/codecs-$model.jsonl" "${words[@]}"
}

base=(
    'full|bf16' 'none|bf16' 'full|int'{8,7,6,5,4,3,2,1} 'full|int'{4,3,2}'|zstd' 'full|kivi:'{4,2} 'full|turbo:'{4,3,2}
    'full|fp8' 'full|transform:'{16,32,64,96,128,200} 'leaveout@0.1|int'{8,4,3,2}'|zstd' 'q2c@'{0.75,0.5,0.25}'|int'{8,4,3}
    'leaveout@0.08,budget=shared|transform:'{32,64,96,128,200} 'leaveout@0.05|int4|zstd' 'vlcache@0.1|int4|zstd'
)
sweep cloud "${base[@]}" 'full|apart,text=int8,visual='{int2,turbo:2} 'full|svd:'{64,32,16,8,4,2} 'full|delta:'{10,0} \
    'full|mixed@testbed/cloud/mixed.json'
sweep edge "${base[@]}" 'full|mixed@testbed/edge/mixed.json'

# The recipes that `kvferry tune` chose on validation questions, once on the test split.
for model in cloud edge; do
    kvferry sweep --model "testbed/$model" --check forced --n 1000 --protocols AB --jpeg 90,60,40,30,25,20,15,10,5 \
        --embeds int4,int3,int2 --out "results/headline-$model.jsonl" --recipe 'full|bf16' --recipe 'none|bf16' \
        --recipe 'leaveout@0.08,budget=shared|transform:80' --recipe 'full|transform:80' --recipe 'full|int4|zstd' \
        --recipe 'leaveout@0.05|int4|zstd'
done
