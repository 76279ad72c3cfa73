"""Measurements of dare_train against its targets: size, speed, memory, peers. `scripts/bench` runs them.

A target that is missed is printed as missed; no test depends on one. Everything lasting is kept in one cache
folder (`DARE_TRAIN_BENCH_DIR`, by default ~/.cache/dare_train_bench), which may be deleted at any time.
"""
