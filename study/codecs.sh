#!/usr/bin/env bash
# The raw results about codecs: `make results-full` runs this. Resumable; about an hour of one core.
set -euo pipefail

export KVFERRY_PROFILES=${KVFERRY_PROFILES:-out/kvtc}   # the baseline's profiles; transform's ship with the models
mkdir -p "$KVFERRY_PROFILES"
for model in cloud edge; do
    profile=$KVFERRY_PROFILES/$model-kvtc.profile
    [ -e "$profile" ] || kvferry calibrate "testbed/$model" --kind kvtc --n 200 --rank 384 --out "$profile"
done

base=(
    'full|bf16' 'none|bf16' 'full|int'{8,7,6,5,4,3,2,1} 'full|int'{4,3,2}'|zstd' 'full|int'{4,3,2}',coder=range'
    'full|kivi:'{4,2} 'full|turbo:'{4,3,2} 'full|fp8' 'full|kvtc:'{4,8,16,24}'|zstd' 'full|transform:'{16,32,64,96,128,200}
    'leaveout@0.1|int'{8,4,3,2}'|zstd' 'q2c@'{0.75,0.5,0.25}'|int'{8,4,3}
    'leaveout@'{0.08,0.1}',budget=shared|transform:'{32,64,96,128} 'leaveout@0.05|int4|zstd' 'vlcache@0.1|int4|zstd'
    'full|svd:'{64,32,16,8,4,2} 'full|delta:10' 'full|delta:0' 'full|delta:'{10,0}',shallow=1,middle=1.5,deep=2'
    'full|apart,text=int8,visual='{int2,turbo:2}
)
for model in edge cloud; do
    words=()
    for recipe in "${base[@]}" "full|mixed@testbed/$model/mixed.json"; do words+=(--recipe "$recipe"); done
    kvferry sweep --model "testbed/$model" --check forced --n 1000 --protocols A --jpeg 90,60,40,30,20,15,10 \
        --embeds int4,int3,int2 --out "study/results/codecs-$model.jsonl" "${words[@]}"
done

# The recipes that `kvferry tune` chose on validation questions, once on the test split.
for model in cloud edge; do
    words=()
    for recipe in 'full|bf16' 'none|bf16' 'full|int4|zstd' 'leaveout@0.05|int4|zstd'; do words+=(--recipe "$recipe"); done
    for presets in "testbed/$model/presets.json" "testbed/$model/presets-B.json"; do
        for name in tiny balanced; do  # a preset is missing where no recipe passed
            ! grep -q "\"$name\":" "$presets" || words+=(--recipe "$name@$presets")
        done
    done
    kvferry sweep --model "testbed/$model" --check forced --n 1000 --protocols AB --jpeg 90,60,40,30,25,20,15,10,5 \
        --embeds int4,int3,int2 --out "study/results/headline-$model.jsonl" "${words[@]}"
done
