"""Runs one trial in this process and prints its figures as JSON."""

import json
import sys

import benchmarks.trials.heap
import benchmarks.trials.loads
import benchmarks.trials.pages  # noqa: F401 - for the trials in them
from benchmarks.trials.measuring import TRIALS

json.dump(TRIALS[sys.argv[1]](*sys.argv[2:]), sys.stdout)
