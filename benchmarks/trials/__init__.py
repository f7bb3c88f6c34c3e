"""What ``benchmarks.memory`` measures, each in a process of its own: ``python -m benchmarks.trials NAME ...``.

A trial prints its figures as JSON; memory in bytes, mostly above what the process had at its start, times in seconds.
How they are shown is ``benchmarks.memory``.
"""
