"""What only a GPU can show: tests marked `gpu`, and `python -m tests.gpu`, which runs them and the benchmarks of a GPU."""
