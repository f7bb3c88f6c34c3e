"""The wall: hundreds of real models served from a cgroup that holds a tenth of them; see ``python -m benchmarks.wall``.

``models`` makes, loads and uses them, ``store`` keeps them on disk, ``rows`` are the caches that are compared,
``child`` is the process that serves from inside the cgroup, ``watch`` runs and samples it from outside.
"""
