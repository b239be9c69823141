#!/usr/bin/env bash
# The raw results behind the table of claims that no sweep makes. A file that is there already is not made again.
set -euo pipefail

traces=${TRACES:-../shared/data/traces}   # recorded links; they are not part of the repository
made() { [ -s "$1" ] || { "${@:2}" > "$1.part" && mv "$1.part" "$1"; }; }

for model in cloud edge control; do
    made "study/results/analyze-$model.json" kvferry analyze "testbed/$model" --n 720 --json
done

for model in cloud edge; do
    for bits in 4 2; do
        out=study/results/diagnose-$model-int$bits.json
        [ -s "$out" ] || kvferry diagnose "testbed/$model" --bits "$bits" --n 270 --check 540 --out "$out"
    done
done

ways=(--policy greedy --policy risk-aware)
for codec in int8 mixed int4; do ways+=(--policy "static:kv:full|$codec"); done
made study/results/simulate-5g-uplink.json kvferry simulate --trace "$traces/5g-driving-downlink" --scale 0.07 "${ways[@]}" --json
made study/results/simulate-5g-downlink.json kvferry simulate --trace "$traces/5g-driving-downlink" "${ways[@]}" --json
made study/results/simulate-cellular.json kvferry simulate --trace "$traces/cellular-uplink" "${ways[@]}" --json
team=(--table qwen-3b --table qwen-7b --table qwen-14b --table qwen-3b --deadline 5)
for agents in 4 8; do
    made "study/results/simulate-agents-$agents.json" kvferry simulate --trace 50mbit "${team[@]}" --agents "$agents" \
        --policy 'static:kv:full|int8' --json
done
made study/results/simulate-fallback-8.json kvferry simulate --trace 50mbit --table qwen-7b-scout --deadline 5 --agents 8 \
    --policy risk-aware --json

for model in cloud edge; do
    kvferry sweep --model "testbed/$model" --check forced --n 1000 --codecs bf16 --lossless '' --protocols A \
        --fractions 0.75,0.25 --selections q2c,snapkv,h2o,random --modalities text_preserving \
        --out "study/results/text-$model.jsonl" --processes 1
done

made study/results/decode.json python benchmarks/decode.py --json
made study/results/evidence.json python benchmarks/evidence.py --tokens 4096 --layers 1 --rounds 5 \
    --kinds question 'after the picture' 'after the picture, and densities' --json
