"""Parts of scripts/benchmark_gpu.py."""
