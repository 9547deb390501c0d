"""Runs of scale/ one after the other in one process of one rank: most of a short launch is its imports.

session_worker.py RUNS.json      a list of {"arguments": [...]} of launch.py, each a training run; "averaged": a file for the
                                 weights of PPO-EWMA's average as the run begins; "replace": a file and what is copied over it
                                 before. Prints FOUND and how each ended: "" or its error
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import save_file

from scale.config import ScaleConfig, check
from scale.distributed import World, start
from scale.run import alone, open_session
from scale.sharding import gathered
from tppo_ref.method.errors import UserError
from tppo_ref.runs.parsing import parse


def run(arguments: list[str], world: World, averaged: str | None) -> None:
    config = check(parse(ScaleConfig, arguments, prog="test"))
    with alone(config, world), closing(open_session(config, world)) as session:
        if averaged:
            ewma = session.trainer.ewma
            found = {name: tensor.clone() for name, tensor in gathered(ewma.module)}
            save_file(found | {"weight": torch.tensor(ewma.weight, dtype=torch.float64)}, averaged)
        session.train()


def main(runs: list[dict]) -> list[str]:
    world, ended = start(device="cpu", timeout_s=60), []
    for one in runs:
        try:
            if "replace" in one:
                shutil.copy(*reversed(one["replace"]))
            run(one["arguments"], world, one.get("averaged"))
            ended.append("")
        except UserError as error:
            ended.append(str(error))
    return ended


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))), flush=True)
    os._exit(0)
