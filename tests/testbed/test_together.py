"""Two processes on one model take the same steps, on the mean of their gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from kvferry.testbed.runlog import Stage

torch.set_num_threads(1)
out = Path(sys.argv[1])
module = nn.Linear(3, 1)
stage = Stage(out, "stage", {"module": module}, steps=3, rate=0.1, resume=False)
rank, world = stage.together.rank, stage.together.world
torch.manual_seed(9 + rank)
nn.init.normal_(module.weight)
stage.together.share(stage.parameters)
seen = []
for step in stage:
    x = torch.full((1, 3), float(step * world + rank + 1))
    stage.step(module(x).sum())
    seen.append([p.grad.flatten().tolist() for p in module.parameters()])
    stage.log(step=step)
(out / f"{rank}.json").write_text(json.dumps({"weight": module.weight.tolist(), "grads": seen, "world": world}))
"""


def test_gradients_are_averaged_and_one_writes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run([*command, str(tmp_path)], check=True, timeout=120, capture_output=True)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["world"] == two["world"] == 2
    assert one["weight"] == two["weight"]
    # Inputs were 1 and 2, then 3 and 4, then 5 and 6; the norm of the gradient is clipped to 1.
    for step, mean in enumerate((1.5, 3.5, 5.5)):
        norm = (3 * mean**2 + 1) ** 0.5
        for rank in (one, two):
            weight, bias = rank["grads"][step]
            assert all(abs(value - mean / norm) < 1e-4 for value in weight)
            assert abs(bias[0] - 1 / norm) < 1e-4
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "stage.state").is_file()
