"""`launch.py report`: figures and the table of phases, from the files of a run, with the dry run's memory and a plan's seconds."""

from __future__ import annotations

import csv
import json

from scale.config import ScaleConfig
from scale.memory.dryrun import bytes_per_phase
from scale.report import report
from tppo_ref.runs.parsing import replace_fields

SHAPE = {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": False}  # fmt: skip


def test_phases_stand_beside_what_is_predicted_of_them(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    out = tmp_path / "run"
    out.mkdir()
    config = replace_fields(ScaleConfig(), {
        "algo.model.policy": str(tmp_path / "config.json"), "algo.run.out": str(out), "algo.model.device": "cuda",
        "algo.rollout.slots": 4, "algo.rollout.window": 16, "algo.rollout.max_response_tokens": 64, "algo.task.max_prompt_tokens": 8,
    })  # fmt: skip
    phases = {f"time/{phase}_s": 1.0 for phase in ("rollout", "verify", "forward", "policy", "value", "sync")}
    memory = {f"memory/{phase}_used": 5e9 for phase in ("rollout", "forward", "policy", "value", "sync")}
    records = [{"step": step, "time/step_s": 6.0, "response/score_mean": 0.1 * step} | phases | memory for step in (1, 2)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert report(config) == 0
    printed, predicted = capsys.readouterr().out, bytes_per_phase(config)
    with (out / "measured.csv").open(newline="") as file:
        rows = {row["phase"]: row for row in csv.DictReader(file)}
    assert float(rows["policy"]["predicted_bytes"]) == predicted["policy_update"]
    assert float(rows["forward"]["predicted_bytes"]) == max(predicted["logprob"], predicted["value_forward"])
    assert float(rows["sync"]["used_over_predicted"]) == 5e9 / predicted["sync"]
    assert json.loads((out / "dry_run.json").read_text())["bytes_per_phase"] == predicted
    assert {path.name for path in (out / "report").iterdir()} == {"curves.csv", "curves.png", "phases.csv", "phases.png"}
    assert "used / predicted" in printed


def test_a_run_whose_model_is_gone_is_reported_without_predictions(tmp_path, capsys):
    config = replace_fields(ScaleConfig(), {"algo.model.policy": str(tmp_path / "gone"), "algo.run.out": str(tmp_path)})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "time/step_s": 6.0, "time/rollout_s": 4.0}) + "\n")
    assert report(config) == 0
    assert "nothing is predicted: algo.model.policy: got " in capsys.readouterr().out
