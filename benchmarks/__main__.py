"""`make bench`: every benchmark that ends within minutes, in turn. Headline and sweep are commands of their own.

python -m benchmarks                  advantages, batching, overhead
python -m benchmarks.at_32b           own seconds, padding, waiting at the 32B run's shape
python -m benchmarks.mutants          no speed: which small changes of the code the tests see, two hours (extra `mutants`)
python -m benchmarks.gpu              on one bare GPU, ten minutes: egae, attention, training's MFU, PPO against T-PPO, memory
python -m benchmarks.scale_overhead   with vLLM: own share of a cpu-tiny step, memory
python -m benchmarks.sync             with vLLM: weight sync against a copy
python -m benchmarks.verdicts FOLDER  scale's verifier on the examples of math-verify's source archive
python -m benchmarks.versions         the stated ranges of Python, torch and transformers, tried
python -m benchmarks.plans            no speed of ours: what the planner recommends for the shipped configs
python -m benchmarks.update_level     no speed of ours: T-PPO over PPO by the clock, training as fast as was published
python -m benchmarks.admission        no speed of ours: an engine that never preempts, by the clock
python -m benchmarks.vllm_full_cache  with vLLM: engine steps per window when its cache is full, counted
python -m benchmarks.vllm_windows     with vLLM: T-PPO's step against PPO's, five seeds
python -m benchmarks.sweep            tunes PPO and T-PPO on the same grid
python -m benchmarks.fuzz             thousands of bad inputs: each one line and exit code 2
python -m benchmarks.headline         PPO against T-PPO, five seeds a task
python -m benchmarks.fair_headline    PPO with every lever and at its best against tppo-once, on the CPU clock, twelve seeds
python -m benchmarks.dropped_gradient the policy gradient with and without the way through the prefix
python -m benchmarks.lever_learning   what each lever of training once costs in learning, at equal tokens
python -m benchmarks.factorial        cut rule x critic x window on text, stated before its first run: hours
python -m benchmarks.studies all      every study stated before its first run, in turn, or one by its name (`-h` says which): hours
python -m benchmarks.levers           CPU seconds per token of each lever, and docs/levers.md
python -m benchmarks.levers_vllm      the same of scale/ with vLLM in it
python -m benchmarks.unchanged        no speed: whether a re-arrangement changed a number, against those of an earlier commit
"""

from __future__ import annotations

import subprocess
import sys

for name in ("advantages", "batching", "overhead"):
    print(f"\n== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
