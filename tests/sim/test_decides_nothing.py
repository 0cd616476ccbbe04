"""The simulator is the engine's loop: it may ask, and hand over, but not decide."""

import ast
from pathlib import Path

import pagedkv.sim
from pagedkv.core.engine import Engine
from pagedkv.core.scheduler import Scheduler
from pagedkv.sim.presets import cost_preset
from pagedkv.sim.simulator import Replica
from tests.sim.workloads import config

SOURCES = sorted(Path(pagedkv.sim.__file__).parent.rglob("*.py"))
# What changes who has which block, or who runs.
DECIDING = {
    "allocate",
    "share",
    "release",
    "forget",
    "preempt",
    "admit",
    "grow",
    "schedule",
    "fork",
}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr


def test_only_the_pure_replay_moves_blocks():
    """It has no engine: it asks the engine's own pool and index, prompt by prompt."""
    deciding = {path.name: DECIDING & set(calls(path)) for path in SOURCES}
    assert {name: found for name, found in deciding.items() if found} == {
        "replay.py": {"allocate", "share", "release"}
    }


def test_a_replica_runs_the_engine_itself():
    replica = Replica(config(), cost_preset("a100-llama3-8b"))
    assert type(replica.engine) is Engine
    assert type(replica.engine.scheduler) is type(replica.scheduler) is Scheduler
