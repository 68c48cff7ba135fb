"""Run `python -m benchmarks` under its other name, `python -m scripts.benchmark`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("benchmarks", run_name="__main__")
