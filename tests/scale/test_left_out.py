"""Two ranks share the check of the references, and train on the same prompts."""

from __future__ import annotations

import json

from scale_helpers import arguments, check_conservation, launch, responses_of


def test_two_ranks_leave_out_what_either_has_found(tmp_path, model, problems):
    rows = [json.loads(line) for line in problems.read_text().splitlines()[:8]]
    proof = "We show that the two sides are equal because each of them counts the same pairs of points in the plane."
    for i in (2, 5):
        rows[i]["answer"] = proof
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    out = tmp_path / "run"
    done = launch(*arguments(model, train, out, "--algo.task.eval_path", str(test)))
    assert done.returncode == 0, done.stderr[-2000:]
    listed = json.loads((out / "references.json").read_text())
    assert [(row["prompt"], row["where"]) for row in listed["left_out"]] == [(2, f"{train}:3"), (5, f"{train}:6")]
    assert [row["where"] for row in listed["evaluation"]] == [f"{test}:3"]
    assert all("reference answer" in row["why"] for row in listed["left_out"])
    assert done.stderr.count("2 of 8 references fail against themselves") == 1, "once, whatever the number of ranks"
    ended = {int(row["prompt"]) for row in responses_of(out)}
    assert len(ended) > 1
    assert ended <= {0, 1, 3, 4, 6, 7}
    check_conservation(out)
