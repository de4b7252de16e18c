"""What every room may use: errors, atomic files, the process group, the run log, progress."""
