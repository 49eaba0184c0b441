"""One loop for every task: state, parallel backends, schedules, checkpoints, writers."""
