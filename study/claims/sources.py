"""The claims of this project's sources, with their published figures; nothing here is measured."""

from __future__ import annotations

from study.claims.base import Claim

A = 'W.-L. Cheng and W. Liao, "Task-Aware KV-Cache Compression" (2026)'
B = 'W.-L. Cheng and W. Liao, "Scout" (2026)'
TOPIC_1, TOPIC_13 = "their research notes, topic 1", "their research notes, topic 13"
VL_CACHE = "VL-Cache, arXiv 2410.23317"
CAPSULE = "KVCapsule, arXiv 2605.16439"

MORE = "bash study/claims.sh"
CODECS = "bash study/codecs.sh"
SWEEP = "make results-full"
SCOUT = "python -m study scout-overlap"

_MODEL = "Qwen/Qwen2-VL-7B-Instruct"
_ANALYZE = f"kvferry analyze {_MODEL} --questions mine.jsonl --images photos/ --json"
_DIAGNOSE = f"kvferry diagnose {_MODEL} --bits 4 --questions mine.jsonl --images photos/"
_SCORERS = (
    f"kvferry sweep --model {_MODEL} --protocols A --selections q2c,snapkv,h2o,random,vlcache "
    "--budgets uniform,sparsity --fractions 0.25,0.1,0.05,0.02 --codecs bf16 --lossless '' --out scorers-7b.jsonl"
)
_CODECS = (
    f"kvferry sweep --model {_MODEL} --protocols A --recipe 'full|bf16' --recipe 'full|int8' --recipe 'full|int4' "
    "--recipe 'full|int3' --recipe 'full|int2' --recipe 'full|svd:64' --recipe 'full|svd:32' --recipe 'full|delta:10' "
    "--recipe 'full|delta:0' --recipe 'q2c@0.75|int4' --out codecs-7b.jsonl"
)

CLAIMS = (
    Claim(1, "Visual tokens have a lower effective rank than text", "about half", TOPIC_13, MORE, _ANALYZE),
    Claim(2, "Importance of visual tokens is long-tailed", "no figure", TOPIC_13, MORE, _ANALYZE),
    Claim(
        3, "Modality-aware compression needs less bandwidth for the same accuracy", "30 to 50 % less", TOPIC_13, SWEEP,
        _SCORERS,
    ),
    Claim(4, "Visual tokens can be skipped for text-only questions", "no figure", TOPIC_13, MORE, _ANALYZE),
    Claim(
        5, "At 25 % of the tokens Q2C beats SnapKV beats H2O beats random",
        "F1 .428 / .292 / .205 / .193 (Qwen-7B, n = 50); a later run, n = 200: Q2C and SnapKV equal", f"{A}; {B}",
        f"{SWEEP}; {MORE}", _SCORERS,
    ),
    Claim(
        6, "INT8 is lossless, INT4 nearly, INT3 loses a little, INT2 nearly all",
        "99.4 % or more; 96 to 100 % (77 % on Qwen-7B); 93 %; 15 %", f"{A}; {TOPIC_1}", CODECS, _CODECS,
    ),
    Claim(
        7, "One protected layer restores low bits where damage is concentrated, not where it is distributed",
        "77 to 101 % at 3.6x", A, MORE, _DIAGNOSE,
    ),
    Claim(8, "Delta coding is worse than quantizing directly", "66.9 % against 72.5 %, INT4", A, CODECS, _CODECS),
    Claim(
        9, "SVD falls off a cliff; few singular values hold the energy",
        "59 % at rank 32, 95 % at 64; the top 5 % hold 61.6 %", TOPIC_1, f"{CODECS}; {MORE}", _CODECS,
    ),
    Claim(
        10, "Q2C at 75 % with INT4 keeps nearly all", "96 % at 18.75 % of the bytes (3B)", TOPIC_1, f"{CODECS}; {MORE}",
        _CODECS,
    ),
    Claim(
        11, "A smaller model chooses what the larger one would",
        "overlap 82 to 84 % at 75 %, 64 to 70 % at 50 %, 45 to 59 % at 25 %; 99.4 % of the F1 (7B for 14B)", B, SCOUT,
        "python -m study scout-overlap --edge Qwen/Qwen2-VL-2B-Instruct --cloud Qwen/Qwen2-VL-7B-Instruct",
    ),
    Claim(
        12, "Positions instead of a cache are next to nothing", "336 B against 9.7 MB: 28,800x", B, SCOUT,
        "python -m study scout-overlap --edge Qwen/Qwen2-VL-2B-Instruct --cloud Qwen/Qwen2-VL-7B-Instruct",
    ),
    Claim(
        13, "Fewer bytes cost quality in steps: full, INT8, mixed INT4, INT4",
        "100 / 99.4 / 93.6 / 68.7 % at 9.7 / 4.7 / 2.6 / 2.3 MB (Qwen-7B, n = 200)", B, CODECS, _CODECS,
    ),
    Claim(
        14, "The adaptive policy nears the oracle and is in time more often than static INT8",
        "within 1.5 %; 75 / 88 / 100 % against 58 / 75 / 88 % at 1 / 3 / 5 s", B, MORE,
        "kvferry profile --edge EDGE --cloud CLOUD --out points.json; "
        "kvferry simulate --points points.json --trace FILE",
    ),
    Claim(
        15, "Sharing by size saves 4 agents on one uplink; 8 only the fallback",
        "rounds in time: 4 agents 0 % equal, 100 % by size; 8 agents 0 % both", B, MORE,
        "kvferry simulate --points points.json --trace 50mbit --agents 4 --deadline 5",
    ),
    Claim(
        16, "A tenth of the cache keeps the accuracy, and is faster and smaller",
        "98 %; decode up to 7.08x, 100 tokens up to 2.33x; 90 % less memory; scoring 1 to 4 % of prefill", VL_CACHE,
        f"{SWEEP}; {MORE}", f"{_SCORERS}; python benchmarks/decode.py --device cuda --dtype bfloat16 --layers 28",
    ),
    Claim(
        17, "60 % smaller without loss, on the backbone as it is", "2.4x the memory, up to 2x the tokens per second",
        CAPSULE, "python -m study capsule", f"python -m study capsule --model {_MODEL}",
    ),
    Claim(18, "Accuracy collapses below 5 % of the cache", "no figure", VL_CACHE, SWEEP, _SCORERS),
)  # fmt: skip
