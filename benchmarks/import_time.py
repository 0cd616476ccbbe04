"""How long `import pagedkv` takes, beside its own dependencies and a bare interpreter.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --repeats 20

Each import runs in processes of its own, in turn; the fastest of each counts.
"""

import argparse
import subprocess
import sys
import time

STATEMENTS = ("pass", "import numpy", "import msgspec", "import pagedkv")


def seconds(statement: str) -> float:
    """Wall-clock seconds of one interpreter that does nothing else."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    repeats = parser.parse_args().repeats
    rounds = [[seconds(each) for each in STATEMENTS] for _ in range(repeats)]
    print(f"python {sys.version.split()[0]}, fastest of {repeats}")
    for statement, times in zip(STATEMENTS, zip(*rounds, strict=True), strict=True):
        print(f"  {statement:16s}{min(times):.3f} s")


if __name__ == "__main__":
    main()
