"""``python -m study squad-diagnose``: which of SmolLM2's layers suffer from few bits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.console import typed
from study.squad import DATA, FOLDER


def squad_diagnose(
    bits: Annotated[int, typer.Option(help="To try.", min=1, max=8)] = 4,
    n: Annotated[int, typer.Option(help="Questions of the validation split.", min=1)] = 40,
    data: Annotated[Path, typer.Option(help="Folder of calibration.jsonl and validation.jsonl.")] = DATA,
    model: Annotated[str, typer.Option(help="Shipped name, folder or Hub id.")] = "smollm2",
    folder: Annotated[Path, typer.Option(help="Where the results and the profiles go.")] = FOLDER,
) -> None:
    """Ask with all layers in few bits, then with each alone; write two profiles for the codec ``mixed``."""
    import numpy as np
    import torch

    from kvferry.evaluate.sweep import provenance
    from kvferry.models import load
    from study.squad.choosing import chosen_prompt, counter, room
    from study.squad.diagnosis import Damage, Floats, found, measure, write_profiles
    from study.squad.texts import read_squad, texts

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    vlm = load(model, dtype="float32")
    prompt = chosen_prompt(vlm, folder, data)
    rows: list[tuple[Floats, Floats, Floats]] = []
    for text in texts(read_squad(data / "validation.jsonl"), counter(vlm), room(vlm, prompt, 512), 2):
        if len(rows) < n:
            rows += measure(vlm, prompt, text, bits)
    kl, changed, energy = (np.stack(x) for x in zip(*rows[:n], strict=True))
    told = found(Damage(kl, changed, energy), bits)
    command = typed("python -m study")
    out = folder / f"diagnose-int{bits}.json"
    out.write_text(json.dumps(told | {"command": command, **provenance(vlm)}) + "\n")
    write_profiles(folder, vlm.fingerprint, told["order"], bits)
    print(f"wrote {out}: {told['pattern']}, worst layers {told['order'][:5]}")
