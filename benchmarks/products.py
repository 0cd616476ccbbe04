"""How long does a product of few rows take: torch's, and ours with plain and packed weights?

    python benchmarks/products.py
    python benchmarks/products.py --rows 1 16 --shapes 4096x4096

Shapes are inputs x outputs; the default ones are SmolLM2-135M's. Each contender goes through
several matrices in turn, so that they come from memory as in a model; of all rounds the best
counts, once all contenders agree. Random weights are packed in fp32: those of a GGUF can lie in
bytes, which is faster still.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from pagedkv.cli.machine import cores, machine, versions
from pagedkv.cli.results import check_writable, write_result
from pagedkv.device.cpu.linear import get_ready, multiply, pack

NUMBERS = 1 << 23  # of the matrices together: more than caches hold


def best(rounds: int, contenders: dict[str, Callable[[], list[torch.Tensor]]]) -> dict[str, float]:
    """Return each one's seconds in its best round; they take turns."""
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


@torch.no_grad()
def measure(inputs: int, outputs: int, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds of one product by contender."""
    generator = torch.Generator().manual_seed(options.seed)
    count = max(NUMBERS // (inputs * outputs), 2)
    plain = [torch.randn(outputs, inputs, generator=generator) for _ in range(count)]
    packed = [pack(weight) for weight in plain]
    x = torch.randn(rows, inputs, generator=generator)
    contenders: dict[str, Callable[[], list[torch.Tensor]]] = {
        "torch": lambda: [torch.nn.functional.linear(x, weight) for weight in plain],
        "plain": lambda: [multiply(x, weight, outputs) for weight in plain],
        "packed": lambda: [multiply(x, panels, outputs) for panels in packed],
    }
    first, *others = (contender() for contender in contenders.values())
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-3, rtol=1e-4)
    seconds = best(options.rounds, contenders)
    each = {name: 1e3 * taken / count for name, taken in seconds.items()}
    print(f"{inputs:6} x {outputs:<6}{rows:5}", end="")
    print("".join(f"{ms:10.3f}" for ms in each.values()), end="")
    print("".join(f"{each['torch'] / each[name]:9.2f}x" for name in ("plain", "packed")))
    return {"inputs": inputs, "outputs": outputs, "rows": rows, "ms": each}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ["576x576", "576x1536", "1536x576", "576x49152"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="default: %(default)s")
    rows = [1, 4, 16, 32, 64, 128]
    parser.add_argument("--rows", nargs="+", type=int, default=rows, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    options = parser.parse_args()
    check_writable(options.json)
    torch.set_num_threads(options.threads)
    get_ready()
    host = machine()
    print(f"{host['cpu']}, {options.threads} threads, seed {options.seed}")
    print(", ".join(f"{name} {text}" for name, text in versions().items() if text))
    print("inputs x outputs rows  torch ms     plain    packed  torch beside them")
    sizes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    found = [measure(i, o, rows, options) for i, o in sizes for rows in options.rows]
    settings = vars(options) | {"schema_version": 1, "versions": versions(), "machine": host}
    write_result(settings | {"products": found}, options.json)


if __name__ == "__main__":
    main()
