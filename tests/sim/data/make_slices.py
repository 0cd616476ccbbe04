"""Makes this folder's files from the public traces they are slices of.

    python tests/sim/data/make_slices.py TRACES

TRACES holds, as published: ``mooncake/conversation_trace.jsonl`` (kvcache-ai/Mooncake, Apache-2.0),
``llmservingsim_vllm_real/`` (casys-kaist/LLMServingSim, MIT) and
``calibration/aic_step_times_grid.txt`` (ai-dynamo/aiconfigurator tables, Apache-2.0).
"""

import csv
import json
import sys
from pathlib import Path

from pagedkv.sim.readers import read_trace
from pagedkv.sim.traces import write_trace

HERE = Path(__file__).parent
ROWS = 400


def conversation(traces):
    """The first requests of Mooncake's conversation trace, as they are."""
    lines = (traces / "mooncake/conversation_trace.jsonl").read_text().splitlines()[:ROWS]
    (HERE / "conversation.jsonl").write_text("\n".join(lines) + "\n")


def real_run(traces):
    """The 300 requests of a vLLM run: block ids in place of token ids, and what was measured."""
    folder = traces / "llmservingsim_vllm_real"
    source = read_trace(folder / "sharegpt-llama-3.1-8b-300-sps10.jsonl", "llmservingsim")
    write_trace(source, HERE / "rtx4090_requests.jsonl", "timed_trace", block_size=16)
    run = folder / "RTX4090_Llama-3.1-8B"
    rows = [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]
    start = min(row["queued_ts"] for row in rows)
    with (HERE / "rtx4090_times.csv").open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["queued", "first_token", "last_token"])
        for row in rows:
            times = row["queued_ts"], row["first_token_ts"], row["last_token_ts"]
            table.writerow([f"{time - start:.4f}" for time in times])
    with (run / "timeseries.csv").open() as text, (HERE / "rtx4090_kv.csv").open("w") as out:
        out.write("t,kv_cache_pct\n")
        out.writelines(f"{row['t']},{row['kv_cache_pct']}\n" for row in csv.DictReader(text))


def step_times(traces):
    """The 40 step times, as a table."""
    with (HERE / "step_times.csv").open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["hardware", "devices", "phase", "length", "batch", "milliseconds"])
        text = (traces / "calibration/aic_step_times_grid.txt").read_text()
        for line in text.splitlines():
            device, model, tp, phase, length, batch, ms, _ = line.split()
            name = f"{device.partition('_')[0]}-llama3-{model.rpartition('-')[2].lower()}"
            kind = {"static_gen": "decode", "static_ctx": "prefill"}[phase]
            table.writerow([name, tp[2:], kind, length[4:], batch[3:], ms])


if __name__ == "__main__":
    for make in (conversation, real_run, step_times):
        make(Path(sys.argv[1]))
