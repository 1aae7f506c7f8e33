"""What pruning gains: timing, benchmark, cost in multiply-adds, schedules that meet a budget."""
