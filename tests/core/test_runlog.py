"""A logged run comes out again byte for byte; the same seed gives the same log."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pagedkv import InvalidTransition, Scheduler
from pagedkv.core.runlog import RunLog, plan_bytes, replay
from pagedkv.eviction import policy
from tests.core.answers import answer
from tests.core.fakes import make_config, make_request


def serve(path, seed=0, policy_name="priority"):
    """A crowded run with everything in it: forks, swaps, evictions, aborts, stops, discards."""
    config = make_config(
        4, 24, num_cpu_blocks=12, scheduling_policy=policy_name, max_skips=1, seed=seed
    )
    rng = np.random.default_rng(seed)
    policies = [None, "sinks=4 + recent=8 + budget=12 + chunk=8", policy("streaming", budget=16)]
    plans = []
    with RunLog(Scheduler(config), path) as scheduler:
        for i in range(14):
            request = make_request(
                f"r{i}",
                rng.integers(0, 60, 9).astype(np.int32),
                n=1 + i % 2,
                seed=None,
                max_tokens=int(rng.integers(2, 24)),
                min_tokens=i % 2,
                stop_token_ids=[7],
                logit_bias={i: -0.5} if i % 3 == 0 else None,
                allowed_token_ids=list(range(60)) if i % 4 == 0 else None,
            )
            scheduler.add(
                msgspec.structs.replace(
                    request,
                    priority=int(rng.integers(3)),
                    tenant=f"t{i % 3}",
                    eviction=policies[i % 3],
                )
            )
        while scheduler.has_unfinished():
            plan = scheduler.schedule()
            plans.append(plan_bytes(plan))
            if plan.step == 7:
                scheduler.discard(plan)
                scheduler.reset_prefix_cache()
                continue
            output = scheduler.commit(plan, answer(plan))
            if plan.step == 5:
                scheduler.stop(int(output.seq_ids[0]), "END")
            if plan.step == 9:
                scheduler.abort(next(iter(scheduler._roster.requests)))
    assert scheduler.stats().num_swapped_out > 0
    return plans


@pytest.mark.parametrize("policy_name", ["fcfs", "priority", "lpm", "fair"])
def test_a_log_replays_byte_for_byte(tmp_path, policy_name):
    plans = serve(tmp_path / "run", policy_name=policy_name)
    assert [plan_bytes(plan) for plan in replay(tmp_path / "run")] == plans
    assert len(plans) > 20


def test_the_same_seed_gives_the_same_log_and_another_another(tmp_path):
    logs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        serve(tmp_path / name, seed)
        logs.append((tmp_path / name).read_bytes())
    assert logs[0] == logs[1] != logs[2]


def test_the_log_does_not_depend_on_the_order_of_sets_and_dicts(tmp_path):
    code = "import sys; from tests.core.test_runlog import serve; serve(sys.argv[1])"
    logs = []
    for seed in ("1", "777"):
        path, env = tmp_path / seed, os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(path)]
        subprocess.run(command, env=env, check=True, cwd=Path(__file__).parents[2])
        logs.append(path.read_bytes())
    assert logs[0] == logs[1]


def test_a_plan_that_comes_out_otherwise_is_named(tmp_path):
    serve(tmp_path / "run")
    data = (tmp_path / "run").read_bytes()
    at = data.index(b"num_resident") + 60
    (tmp_path / "wrong").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(InvalidTransition, match="plan 0 is not what it was"):
        list(replay(tmp_path / "wrong"))


def interrupted_once(path, monkeypatch, name, *, after):
    """A run with one commit that is interrupted at a method of the manager; its plans."""
    config, plans = make_config(4, 200), []
    with RunLog(Scheduler(config), path) as scheduler:
        for i in range(3):
            scheduler.add(make_request(f"r{i}", [i] * 9, n=1 + i % 2, max_tokens=20))
        call = getattr(scheduler.manager, name)

        def interrupt(*args):
            if after:
                call(*args)
            raise KeyboardInterrupt

        while scheduler.has_unfinished():
            plan = scheduler.schedule()
            plans.append(plan_bytes(plan))
            if plan.step != 7:  # it fills a block of each
                scheduler.commit(plan, answer(plan))
                continue
            with monkeypatch.context() as patch:
                patch.setattr(scheduler.manager, name, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    scheduler.commit(plan, answer(plan))
    return plans


def test_a_commit_that_was_interrupted_before_it_counted_replays_byte_for_byte(
    tmp_path, monkeypatch
):
    plans = interrupted_once(tmp_path / "run", monkeypatch, "advance", after=False)
    assert [plan_bytes(plan) for plan in replay(tmp_path / "run")] == plans
    assert len(plans) > 20


def test_a_commit_that_was_interrupted_later_is_named_where_plans_differ(tmp_path, monkeypatch):
    plans = interrupted_once(tmp_path / "run", monkeypatch, "advance", after=True)
    done = []
    with pytest.raises(InvalidTransition, match="one before it was interrupted"):
        done.extend(plan_bytes(plan) for plan in replay(tmp_path / "run"))
    assert done == plans[: len(done)]
    assert len(done) > 7


def test_the_how_to_runs(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "how-to" / "replay-a-run.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page.name, "exec"), {})
    assert capsys.readouterr().out.splitlines()[0].startswith("0 3 ")


def test_a_file_that_is_no_log_is_refused(tmp_path):
    (tmp_path / "cut").write_bytes(b"\xff\x00\x00\x00\x93")
    with pytest.raises(InvalidTransition, match="the entry at byte 0"):
        list(replay(tmp_path / "cut"))
