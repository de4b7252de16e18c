"""Muon, the parameter groups, the schedule, weight averaging."""
