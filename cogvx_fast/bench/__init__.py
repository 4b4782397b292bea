"""The benchmark that judges the engine: workloads, contenders, one run that alternates them, rows, and the report."""
